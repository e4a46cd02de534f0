"""Names that a trainer or a config does not take: what is taken in their place, or what was probably meant."""

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields

from prefopt.errors import UserTypeError


def refuse_unknown(
    owner: str, names: Iterable[str], taken: Collection[str], elsewhere: Mapping[str, str], page: str
) -> None:
    """Raise a UserTypeError for the first of names that is not among those that `owner` takes.

    Args:
        elsewhere: of names of TRL's, what is taken in their place; the page has all of them.

    Example:
        >>> refuse_unknown("PPOPtxConfig", ["lam"], ["gae_lambda"], {"lam": "set `gae_lambda`"}, "docs/from_trl_ppo.md")
        Traceback (most recent call last):
        prefopt.errors.UserTypeError: PPOPtxConfig takes no 'lam': set `gae_lambda`; TRL's names here: docs/from_trl_ppo.md
    """
    for name in names:
        if name in taken:
            continue
        near = difflib.get_close_matches(name, taken, n=1)
        why = f": {elsewhere[name]}" if name in elsewhere else f" (did you mean {near[0]!r}?)" if near else ""
        raise UserTypeError(f"{owner} takes no {name!r}{why}; TRL's names here: {page}")


def set_in(config: type) -> dict[str, str]:
    """What `refuse_unknown` says of a config's options that are given to the trainer.

    >>> from trl import DPOConfig
    >>> set_in(DPOConfig)["beta"]
    'set it in `args`, a DPOConfig'
    """
    return {field.name: f"set it in `args`, a {config.__name__}" for field in fields(config) if field.init}


def arguments_of(*classes: type) -> list[str]:
    """The names of what classes are made from, without what gathers the rest.

    >>> from trl import RewardTrainer
    >>> arguments_of(RewardTrainer)[:3]
    ['model', 'args', 'data_collator']
    """
    parameters = [one for made in classes for one in inspect.signature(made).parameters.values()]
    return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
