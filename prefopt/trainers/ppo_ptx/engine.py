"""vLLM under PPO-ptx: of a policy that trains LoRA factors, these are sent after each update, and nothing else."""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMClient, VLLMGeneration

from prefopt.errors import UserError
from prefopt.inference.engines import beyond_factors, lora_options

logger = logging.getLogger(__name__)
# Nats per token, on average over the first rollout, by which the engine may differ from the policy. Weights in 16 bit make
# about a tenth of it, another base makes nats.
DRIFT = 0.2


def sends_adapter(model: str | nn.Module, sleeps: bool, peft_config: PeftConfig | None = None) -> bool:
    """Whether of this policy the adapter alone can go to vLLM: one of LoRA factors, to an engine that keeps its base.

    Args:
        sleeps: `vllm_enable_sleep_mode`; asleep, the engine forgets its base.
        peft_config: of the adapter that a model without one will get.
    """
    config = model.peft_config.get("default") if isinstance(model, PeftModel) else peft_config
    return not sleeps and config is not None and beyond_factors(config) is None


class Client(VLLMClient):
    """TRL's client, which leaves a server that takes adapters its base: no group is made to send weights."""

    takes_adapters = False
    loaded: str | None = None

    def init_communicator(self, device: Any = 0) -> None:
        """As TRL does, for a server without `--enable-lora`."""
        self.takes_adapters = self.get_server_info()["lora_config"] is not None
        if not self.takes_adapters:
            super().init_communicator(device)

    def load_adapter(self, name: str, folder: str) -> None:
        """From now on the server draws with the adapter in this folder, and forgets the one before.

        Raises:
            UserError: it cannot load it.
        """
        try:
            body = {"lora_name": name, "lora_path": folder}
            answer = self.session.post(f"{self.base_url}/v1/load_lora_adapter", json=body)
            refusal = None if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
        except OSError as error:
            refusal = str(error)
        if refusal is not None:
            raise UserError(
                f"the vLLM server at {self.base_url} does not load the adapter in {folder} ({refusal}): output_dir must be "
                "on a disk that it sees under the same name, and it must be started with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --max-lora-rank of the adapter's rank or more"
            )
        if self.loaded is not None:
            self.session.post(f"{self.base_url}/v1/unload_lora_adapter", json={"lora_name": self.loaded})
        self.model = self.loaded = name


class PolicyEngine(VLLMGeneration):
    """TRL's vLLM, which of a LoRA policy has the base once and gets each version of the adapter.

        engine: y = W x + s B_v A_v x,   v = 1, 2, ... at each `sync_weights`

    Nothing is merged: neither is the trainer's base touched, which other roles stand on, nor has the engine's to be of its
    dtype. Of a base in 4 bit the engine in the process has the same if vLLM reads bitsandbytes, else the weights as they are
    saved. How far the engine is from the policy TRL logs (`sampling/...`) and corrects by its importance weights. Any other
    policy is sent whole, as TRL sends it, and so is one whose server takes no adapters.

    Args:
        folder: a server reads the adapter from here.

    Raises:
        UserError: the policy is in 4 bit, and its server takes no adapters.
    """

    def __init__(self, *args: Any, folder: str, **kwargs: Any) -> None:
        self.folder, self.version = folder, 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        self.by_adapter = sends_adapter(self.model, self.enable_sleep_mode)
        if not self.by_adapter:
            super()._init_vllm()
        elif self.mode == "colocate":
            original = getattr(inspect.getmodule(VLLMGeneration), "LLM", None)
            with _replaced(VLLMGeneration, "LLM", self._llm_with_adapter(original)):
                super()._init_vllm()
            # In each process its own.
            self._adapter = TemporaryDirectory(prefix="policy-")
        else:
            with _replaced(VLLMGeneration, "VLLMClient", Client):
                super()._init_vllm()
            is_main = self.accelerator.is_main_process
            answer = [self.vllm_client.takes_adapters if is_main else None]
            (self.by_adapter,) = broadcast_object_list(answer)
            if not self.by_adapter and self.is_quantized:
                raise UserError(
                    "use_vllm: a policy in 4 bit is not sent whole, and the server takes no adapter: start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank ..."
                )
            if self.by_adapter and is_main:
                os.makedirs(self.folder, exist_ok=True)
                self._adapter = TemporaryDirectory(prefix="_policy-", dir=self.folder)

    @property
    def is_quantized(self) -> bool:
        return getattr(self.model.config, "quantization_config", None) is not None

    def _llm_with_adapter(self, original: Any) -> Any:
        def make(*, quantization: str | None = None, **options: Any) -> Any:
            from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

            if quantization not in (None, *QUANTIZATION_METHODS):
                logger.warning(
                    "vLLM reads no %s weights: it draws with the base as it is saved. How far that is from the policy "
                    "sampling/... tells; vllm_importance_sampling_mode='token_truncate' keeps long completions from losing "
                    "all their weight",
                    quantization,
                )
                quantization = None
            # TRL's sync would mend another revision of the base.
            revision = getattr(self.model.config, "_commit_hash", None)
            options |= {"quantization": quantization, "revision": revision}
            return original(**options, **lora_options(self.model.peft_config["default"]))

        return make

    def sync_weights(self) -> None:
        """Send the next version of the adapter; of other policies the weights."""
        if not self.by_adapter:
            super().sync_weights()
            return
        self.version += 1
        if self.mode == "server" and not self.accelerator.is_main_process:
            return
        folder = os.path.abspath(self._adapter.name)
        # The size of the base's vocabulary is not asked for on the Hub.
        self.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        # Of this run alone, by which a server tells what it has cached.
        name = f"{os.path.basename(folder)}-{self.version}"
        if self.mode == "server":
            self.vllm_client.load_adapter(name, folder)
            self.vllm_client.reset_prefix_cache()
        else:
            from vllm.lora.request import LoRARequest

            request = LoRARequest(name, self.version, folder)
            self.llm.generate = partial(type(self.llm).generate, self.llm, lora_request=request)
            self.llm.reset_prefix_cache()

    def end_at(self, token_ids: list[int]) -> None:
        """End completions at the trainer's end tokens, not at those that are saved with the base of an adapter."""
        more = self.generation_kwargs.get("stop_token_ids") or []
        self.generation_kwargs = {
            **self.generation_kwargs,
            "ignore_eos": True,
            "stop_token_ids": [*token_ids, *more],
        }

    def check_base(self, logps: Tensor, drawn_by: Tensor, mask: Tensor) -> None:
        """Look at the first rollout, for whether the engine has the base that the policy has.

        Args:
            logps: `[B, T]`, the policy's own of the tokens.
            drawn_by: those that the engine drew by.
            mask: which tokens count.

        Raises:
            UserError: it has another one.
        """
        if not self.by_adapter or self.version > 1:
            return
        drift = (logps - drawn_by)[mask].abs().nanmean().item()
        if drift > DRIFT and not self.is_quantized:
            raise UserError(
                f"use_vllm: vLLM has not the policy's base, since their log-probabilities differ by {drift:.2g} nats per "
                f"token; it has {self.model.name_or_path!r} as it is saved. Save the base in memory and load the policy from there"
            )


@contextmanager
def policy_engine(folder: str) -> Iterator[None]:
    """Inside, a trainer of TRL makes a `PolicyEngine`."""
    with _replaced(GRPOTrainer, "VLLMGeneration", partial(PolicyEngine, folder=folder)):
        yield


@contextmanager
def _replaced(reader: type, name: str, value: Any) -> Iterator[None]:
    """Inside, the module of a class of TRL's has another value under a name that the class reads."""
    module = inspect.getmodule(reader)
    # Without vLLM its class is not there.
    kept = getattr(module, name, None)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)
