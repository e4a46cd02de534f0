"""The pretraining term of a loss: packed text, shuffled once per epoch, with a position that can be saved; its gradient."""

import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from prefopt.errors import UserError
from prefopt.models.heads import has_adapter, read_head
from prefopt.models.passes import max_positions, unwrapped
from prefopt.models.prefix.layout import Rows
from prefopt.trainers.shared.ranges import COUNT, POSITIVE, Range

logger = logging.getLogger(__name__)

RANGES = {
    "ptx_coef": Range(),
    "ptx_batch_ratio": POSITIVE,
    "ptx_max_length": Range(2, is_whole=True),
    "ptx_per_device_batch_size": COUNT,
}


@dataclass
class PretrainingOptions:
    """Options of `Pretraining`, next to those of a trainer."""

    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the loss on pretraining text (the paper's gamma); 0: none."}
    )
    ptx_batch_ratio: float = field(
        default=1.0, metadata={"help": "Pretraining sequences per row of an optimizer step."}
    )
    ptx_max_length: int = field(default=2048, metadata={"help": "Tokens per packed pretraining sequence."})
    ptx_per_device_batch_size: int = field(default=1, metadata={"help": "Pretraining sequences per forward."})


def pack_documents(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Documents -> blocks of `max_length` token ids. Every document ends in EOS; no token is lost.

    Blocks are cut from the concatenated documents, as in GPT's own pretraining: a block may hold the end of one
    document and the beginning of the next. The last block of each thousand documents may be shorter.

    Where the tokenizer begins texts with BOS (Gemma, Llama, Mistral), so do documents and blocks: such models have seen
    no text without it, and most of the gradient would teach them to do without. A block that BOS was put before is one
    token longer than those that a document begins.

    Args:
        dataset: rows `{"text": str}` or `{"input_ids": list[int]}`.
        tokenizer: the policy's.
        max_length: tokens per block at most, at least 2.

    Returns:
        Rows `{"input_ids": list[int]}`.

    Raises:
        ValueError: a row is not a text or token list; the column is missing; nothing is left.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(f"pretrain_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    column = _text_column(dataset.column_names)
    bos, eos = added_bos(tokenizer), _eos_token_id(tokenizer)

    def to_ids(batch: dict, numbers: list[int]) -> dict:
        for number, document in zip(numbers, batch[column], strict=True):
            if document is None:
                raise UserError(f"pretrain_dataset row {number}: field '{column}' is missing; drop the row")
        if column == "text":
            documents = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        else:
            documents = batch["input_ids"]
        return {"input_ids": [_framed(ids, bos, eos) for ids in documents if len(ids)]}

    documents = dataset.select_columns(column).map(to_ids, batched=True, with_indices=True, remove_columns=[column])
    if len(documents) == 0:
        raise UserError("pretrain_dataset: no text in it")
    if empty := len(dataset) - len(documents):
        logger.warning("pretrain_dataset: dropped %d empty of %d documents", empty, len(dataset))
    blocks = pack_dataset(documents, _cut_length(max_length, bos), strategy="wrapped")
    if bos is None:
        return blocks
    return blocks.map(lambda batch: {"input_ids": [_headed(block, bos) for block in batch["input_ids"]]}, batched=True)


def _text_column(columns: list[str]) -> str:
    column = next((name for name in ("input_ids", "text") if name in columns), None)
    if column is None:
        raise UserError(f"pretrain_dataset: expected a column 'text' or 'input_ids', got {columns}")
    return column


def _eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("pretrain_dataset: the tokenizer has no EOS token to end documents with")
    return tokenizer.eos_token_id


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if the tokenizer begins every text with it, else None."""
    if tokenizer.bos_token_id is None:
        return None
    return tokenizer.bos_token_id if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else None


def unscored_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that no block's loss counts: BOS, which is put before a text and never drawn. One that is EOS, too, counts."""
    bos = added_bos(tokenizer)
    return None if bos == tokenizer.eos_token_id else bos


def labels_of(block: list[int], unscored: int | None) -> list[int]:
    """A block's labels: its own tokens, -100 (ignored) at those that are not scored.

    >>> labels_of([2, 5, 6, 1, 2, 7], unscored=2)
    [-100, 5, 6, 1, -100, 7]
    """
    return [-100 if token == unscored else token for token in block]


def _framed(ids: list[int], bos: int | None, eos: int) -> list[int]:
    """A document between BOS, where there is one, and EOS. If they are one token, that which ends a document begins the next."""
    begin = [] if bos in (None, eos, ids[0]) else [bos]
    return [*begin, *ids, *([] if ids[-1] == eos else [eos])]


def _cut_length(max_length: int, bos: int | None) -> int:
    """Tokens that a block takes of the documents, such that `_headed` leaves it no longer than `max_length`."""
    return max_length if bos is None else max_length - 1


def _headed(block: list[int], bos: int | None) -> list[int]:
    """A block with BOS at its head, where there is one."""
    return block if bos in (None, block[0]) else [bos, *block]


class PackedText:
    """An endless stream over the blocks, in a new order each epoch; `position` counts the blocks taken so far.

    The order depends on `seed` and the epoch alone, so setting `position` resumes the stream exactly.

    Example:
        >>> stream = PackedText(Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]}), seed=0)
        >>> first = stream.take(2)
        >>> rest = stream.take(2)
        >>> sorted(first + rest[:1])
        [[1, 2], [3, 4], [5, 6]]
        >>> stream.position = 2
        >>> stream.take(2) == rest
        True
    """

    def __init__(self, blocks: Dataset, seed: int) -> None:
        self.blocks, self.seed, self.position = blocks, seed, 0
        self._order_of: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[list[int]]:
        """The next `count` blocks."""
        numbers = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self.blocks))
            if self._order_of[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                self._order_of = (epoch, torch.randperm(len(self.blocks), generator=generator).tolist())
            numbers.append(self._order_of[1][offset])
        self.position += count
        return [self.blocks[number]["input_ids"] for number in numbers]


class StreamedText:
    """`PackedText` over documents that are read, tokenized and packed only as they are needed.

    Blocks are cut as `pack_documents` cuts them, and shuffled among the next `buffer_size` of
    them, or fewer at the end of the text, where it begins again: every block is taken once in each pass. `position` is
    where a run stands, ready for JSON: where the text was when the buffer was filled, and how many of its blocks are
    taken. Setting it fills the buffer again and goes on exactly there, without reading what lies before, if the
    dataset can (`IterableDataset.state_dict`); one with a shuffle buffer of its own cannot.

    Args:
        documents: rows `{"text": str}` or `{"input_ids": list[int]}`, unshuffled.
        tokenizer: the policy's.
        max_length: tokens per block at most, at least 2.
        seed: of the order.
        buffer_size: blocks that are shuffled among each other.

    Raises:
        ValueError: no text, no such column, or naming the first row that is not as it should be.

    Example:
        >>> from types import SimpleNamespace
        >>> ids = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6]]}).to_iterable_dataset()
        >>> text = StreamedText(ids, SimpleNamespace(bos_token_id=None, eos_token_id=0), max_length=3, seed=0)
        >>> sorted(text.take(3))  # of 1 2 3 0 4 0 5 6 0
        [[0, 4, 0], [1, 2, 3], [5, 6, 0]]
    """

    def __init__(
        self,
        documents: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        buffer_size: int = 1000,
    ) -> None:
        self.documents, self.tokenizer = documents.with_format(None), tokenizer
        self.bos, self.eos = added_bos(tokenizer), _eos_token_id(tokenizer)
        self.cut_length, self.seed, self.buffer_size = _cut_length(max_length, self.bos), seed, buffer_size
        first = next(iter(self.documents), None)
        if first is None:
            raise UserError("pretrain_dataset: no text in it")
        self.column = _text_column(list(first))
        self._go_to({"pass": 0, "row": 0, "empty": 0, "text": None, "rest": [], "buffer": 0})

    def take(self, count: int) -> list[list[int]]:
        """The next `count` blocks."""
        blocks = []
        while len(blocks) < count:
            if self._taken == len(self._buffer):
                self._fill()
            blocks.append(self._buffer[self._taken])
            self._taken += 1
        return blocks

    # ---- position ----

    @property
    def position(self) -> dict[str, Any]:
        return {**self._filled_at, "last_block": self._last_block, "taken": self._taken}

    @position.setter
    def position(self, position: Mapping[str, Any]) -> None:
        self._go_to(position)
        # Nothing was taken yet.
        if position["last_block"] is None:
            return
        self._fill()
        self._taken = position["taken"]
        if self._last_block != position["last_block"]:
            logger.warning(
                "pretrain_dataset: the text at the place where this run stood is not the same as before: its files have "
                "changed, or it is shuffled by itself; the run goes on, but not as one without a break"
            )

    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._pass, self._row, self._empty, self._rest = (place[k] for k in ("pass", "row", "empty", "rest"))
        # The number is that of the buffer that is filled next.
        self._number, self._buffer, self._taken = place["buffer"], [], 0
        self._filled_at, self._last_block = self._place(place["text"]), None
        self.documents.set_epoch(self._pass)
        if place["text"] is not None:
            self.documents.load_state_dict(place["text"])
        self._ids = self._documents()

    def _place(self, text: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "pass": self._pass,
            "row": self._row,
            "empty": self._empty,
            "text": text,
            "rest": self._rest,
            "buffer": self._number,
        }

    # ---- text ----

    def _fill(self) -> None:
        """The next blocks, in their order; those of one buffer are from one pass."""
        if self._buffer:
            self._filled_at = self._place(self.documents.state_dict() if self._row else None)
        blocks: list[list[int]] = []
        while len(blocks) < self.buffer_size:
            whole = min(len(self._rest) // self.cut_length, self.buffer_size - len(blocks))
            if whole:
                cut = whole * self.cut_length
                blocks += [
                    _headed(self._rest[i : i + self.cut_length], self.bos) for i in range(0, cut, self.cut_length)
                ]
                self._rest = self._rest[cut:]
                continue
            ids = next(self._ids, None)
            if ids is not None:
                self._rest = self._rest + ids
                continue
            self._begin_pass()
            if blocks:
                break
        generator = torch.Generator().manual_seed(self.seed + self._number)
        order = torch.randperm(len(blocks), generator=generator).tolist()
        self._buffer, self._taken = [blocks[i] for i in order], 0
        self._last_block = zlib.crc32(repr(blocks[-1]).encode())
        self._number += 1

    def _begin_pass(self) -> None:
        """The text from its beginning. What was left of its end stands before it, so that no token is lost."""
        if self._empty == self._row:
            raise UserError("pretrain_dataset: no text in it")
        if self._empty and self._pass == 0:
            logger.warning("pretrain_dataset: dropped %d empty of %d documents", self._empty, self._row)
        self._pass, self._row, self._empty = self._pass + 1, 0, 0
        self.documents.set_epoch(self._pass)
        self._ids = self._documents()

    def _documents(self) -> Iterator[list[int]]:
        """Token ids of each document that has any, from row number `_row` on."""
        for row in self.documents:
            document = row.get(self.column)
            if not isinstance(document, str if self.column == "text" else list):
                raise UserError(
                    f"pretrain_dataset row {self._row}: field {self.column!r}: expected "
                    f"{'a text' if self.column == 'text' else 'token ids'}, got {document!r}; drop the row"
                )
            self._row += 1
            if self.column == "text":
                document = self.tokenizer(document, add_special_tokens=False)["input_ids"]
            if document:
                yield _framed(document, self.bos, self.eos)
            else:
                self._empty += 1


def share_of_process(
    blocks: list[list[int]],
    process: int,
    processes: int,
    batch_size: int,
    pad_token_id: int,
    unscored: int | None = None,
) -> tuple[list[dict[str, Tensor]], int]:
    """One process's micro-batches of the blocks of an optimizer step, and the target tokens of ALL of them.

    Every process gets the same number of micro-batches, as each backward is a collective act: where the blocks do
    not divide evenly, a process repeats the first block with every label ignored. So are the labels of the token
    `unscored` (`unscored_token`).

    Returns:
        Micro-batches `{"input_ids", "attention_mask", "labels"}` (each `[b, T]`, right-padded; -100 = ignored), and
        the number of predicted tokens over all processes (the first token of a block is not predicted).

    Example:
        >>> batches, num_tokens = share_of_process([[1, 2, 3], [4, 5], [6, 7]], 1, 2, batch_size=4, pad_token_id=0)
        >>> batches[0]["labels"]  # the second block is this process's; the filler counts nowhere
        tensor([[   4,    5, -100],
                [-100, -100, -100]])
        >>> num_tokens
        4
    """
    num_tokens = sum(len(block) - 1 - block[1:].count(unscored) for block in blocks)
    rows = [(block, True) for block in blocks[process::processes]]
    rows += [(blocks[0], False)] * (-(-len(blocks) // processes) - len(rows))
    batches = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        length = max(len(block) for block, _ in chunk)
        ids = torch.full((len(chunk), length), pad_token_id)
        real, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (block, is_own) in enumerate(chunk):
            ids[i, : len(block)] = torch.tensor(block)
            real[i, : len(block)] = 1
            if is_own:
                labels[i, : len(block)] = torch.tensor(labels_of(block, unscored))
        batches.append({"input_ids": ids, "attention_mask": real, "labels": labels})
    return batches, num_tokens


class Pretraining:
    """`ptx_coef` * LM in every optimizer step of a policy (InstructGPT, Eq. 2, second term, and appendix C.4).

    Args:
        dataset: rows `{"text"}` or `{"input_ids"}`; a stream is read as it is needed.
        model: the policy, with TRL's fused LM head.
        args: the trainer's.
        has_untempered_head: whether the policy has one, next to a head that divides by a temperature.

    Raises:
        ValueError: as `pack_documents` and `StreamedText`, or a block is longer than the model reads.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        args: PretrainingOptions,
        accelerator: Accelerator,
        has_untempered_head: bool = False,
    ) -> None:
        positions = max_positions(model.config)
        if positions is not None and args.ptx_max_length > positions:
            raise UserError(f"ptx_max_length={args.ptx_max_length} exceeds the model's {positions} positions")
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        if isinstance(dataset, IterableDataset):
            self.text: PackedText | StreamedText = StreamedText(dataset, tokenizer, args.ptx_max_length, args.seed)
        else:
            with accelerator.main_process_first():
                blocks = pack_documents(dataset, tokenizer, args.ptx_max_length)
            self.text = PackedText(blocks, args.seed)
        self._has_untempered_head = has_untempered_head
        self._has_adapted_head = has_adapter(unwrapped(model).get_output_embeddings())

    @property
    def position(self) -> int | dict[str, Any]:
        """Where the run stands in the text, ready for JSON."""
        return self.text.position

    def go_to(self, position: int | dict[str, Any] | None, checkpoint: str) -> None:
        """Go on where a checkpoint stood.

        Raises:
            UserError: there was no text, or it was a stream then and is none now, or the other way round.
        """
        if position is None:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} is of a run without ptx_coef: leave it out, or start anew"
            )
        if type(position) is not type(self.text.position):
            was = "" if isinstance(position, dict) else "not "
            raise UserError(
                f"resume_from_checkpoint: the pretraining text of {checkpoint} was {was}a stream: give it as it was then"
            )
        self.text.position = position

    def add_to_gradient(self, model: nn.Module, parameters: list[nn.Parameter]) -> tuple[Tensor, dict[str, float]]:
        """Add the term's gradient to the one that is there, of all the micro-batches of an optimizer step.

        That one is set aside meanwhile, so that the norm of each part can be logged, and under DDP is averaged once: one
        more copy of the trainable parameters in memory.

        Args:
            model: the policy, wrapped as it is trained.
            parameters: those of it that are trained.

        Returns:
            ptx_coef * LM of this process; the numbers to log by their keys.
        """
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss, mean = self._backward(model)
        metrics = {"loss/ptx": mean, "grad_norm/ptx": gradient_norm(parameters)}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad += gradient
        return loss, metrics

    def _backward(self, model: nn.Module) -> tuple[Tensor, float]:
        """ptx_coef * LM of this process, and LM of all. Under DDP the last backward averages over the processes."""
        args, processes = self.args, self.accelerator.num_processes
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        blocks = self.text.take(max(1, round(args.ptx_batch_ratio * rows)))
        batches, num_tokens = share_of_process(
            blocks,
            self.accelerator.process_index,
            processes,
            args.ptx_per_device_batch_size,
            self.tokenizer.pad_token_id,
            unscored_token(self.tokenizer),
        )
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, start=1):
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                loss = pretraining_loss(
                    model, batch, num_tokens / processes, self._has_untempered_head, self._has_adapted_head
                )
                self.accelerator.backward(args.ptx_coef * loss)
            total += loss.detach()
        return args.ptx_coef * total, self.accelerator.reduce(total, "mean").item()


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    """L2 norm of all gradients together, the same on every process; of parameters that are all whole or all sharded."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def pretraining_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    num_tokens: float,
    has_untempered_head: bool,
    has_adapted_head: bool,
) -> Tensor:
    """`losses.lm_loss` of a batch, without its logits `[B, T, V]`.

    The fused LM head computes tiles of 4096 positions x 32768 words, and computes them again in the backward pass. An LM
    head with an adapter, which the fused one does not know, gives the logits of the scored positions.

    Args:
        model: the policy, wrapped or not, with TRL's fused LM head.
        batch: `input_ids`, `attention_mask` and `labels` `[B, T]`, padded on the right; -100 = ignored.
        num_tokens: divides the summed loss.
        has_untempered_head: whether the policy has one (`add_untempered_head`); without, its temperature must be 1.
        has_adapted_head: `models.heads.has_adapter` of its LM head.

    Returns:
        A scalar.
    """
    if has_adapted_head:
        ids = batch["input_ids"]
        prompts = torch.arange(len(ids), device=ids.device)
        rows = Rows(ids, batch["attention_mask"], batch["labels"] != -100, prompts)
        output, *_ = read_head(model, rows)
        return F.cross_entropy(output.logits[0].float(), rows.read.labels, reduction="sum") / num_tokens
    options = {"untempered": True} if has_untempered_head else {}
    # Padded at the end alone, where no position depends on it.
    return model(**batch, fused_lm_head=True, num_items_in_batch=num_tokens, **options).loss
