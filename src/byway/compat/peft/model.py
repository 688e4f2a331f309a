"""peft's model classes: a thin module around a model whose side paths the core has hung."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from byway.compat.peft.config import PeftConfig, local_directory
from byway.compat.peft.files import IncompatibleKeys, save
from byway.compat.peft.names import peft_names
from byway.compat.peft.routing import routed
from byway.compat.peft.session import Session
from byway.compat.peft.tuner import Tuner
from byway.core.slots import base_state_dict, side_paths
from byway.errors import AdapterError

__all__ = ["PeftModel"]


class PeftModel(nn.Module):
    """A model with adapters, by peft's interface.

    Parameters and state-dict keys are called what peft calls them; :meth:`get_base_model` is the user's model, whose own keys stay.
    Every output has the base's length, with virtual tokens too (peft's prompts return logits for them as well).
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **_: Any,
    ) -> None:
        session = Session(model)
        session.add(peft_config, adapter_name, cast=autocast_adapter_dtype)
        self._wrap(model, session, prompt=peft_config.is_prompt_learning)

    def _wrap(self, model: nn.Module, session: Session, *, prompt: bool) -> None:
        super().__init__()
        self.session = session
        self.base_model = model if prompt else Tuner(model, session)
        vars(model)["peft_config"] = session.configs
        self.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The adapter in a directory (or hub repository) beside `model`; strict: each tensor must land, each expected one be there."""
        from byway.compat.peft.mapping import model_class

        directory = local_directory(model_id, kwargs.get("subfolder"))
        config = _read_config(directory, config, is_trainable)
        session = Session(model)
        try:
            session.load(config, directory, adapter_name, trainable=is_trainable, cast=autocast_adapter_dtype)
        except Exception:
            vars(model).pop("_byway_peft_session", None)
            raise
        chosen = model_class(config) if cls is PeftModel else cls
        new = object.__new__(chosen)
        PeftModel._wrap(new, model, session, prompt=config.is_prompt_learning)
        if not is_trainable:
            new.eval()
        return new

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.session.configs

    @property
    def peft_type(self) -> Any:
        return next(iter(self.session.configs.values())).peft_type

    @property
    def active_adapter(self) -> Any:
        active = self.session.active
        return active[0] if len(active) == 1 else list(active)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.session.configs[self.session.active[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        named = [vars(config).get("modules_to_save") for config in self.session.configs.values()]
        return {name for names in named if names for name in ([names] if isinstance(names, str) else names)} or None

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """What is trained on the whole model, by adapter name."""
        found = nn.ModuleDict()
        for site, name, side in side_paths(self.session.model):
            if not site.path or self.session.configs[name].is_prompt_learning:
                found._modules[name] = side
        if not found:
            raise AttributeError("prompt_encoder: no adapter with virtual tokens is here")
        return found

    def get_base_model(self) -> nn.Module:
        """The user's model, with what hangs on it."""
        return self.session.model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward; `adapter_names` gives each row of the batch its adapter (``"__base__"``: none)."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        with routed(self.session, adapter_names, batch=given[0].shape[0] if given else None):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own generation, with the cache; `adapter_names` as in :meth:`forward`."""
        with routed(self.session, adapter_names, repeats=True):
            return self.session.model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters: ``default`` into the directory itself, others into a directory of their name below it.

        Always safetensors: a pickle can run code, and peft reads these files in every version of the last years.
        """
        target = Path(save_directory)
        if target.is_file():
            raise AdapterError(f"Provided path ({target}) should be a directory, not a file")
        if not safe_serialization:
            warnings.warn(
                "safe_serialization=False: Byway never writes pickles, adapter_model.safetensors is written instead", stacklevel=2
            )
        unknown = [name for name in selected_adapters or () if name not in self.session.configs]
        if unknown:
            raise AdapterError(
                f"You passed an invalid `selected_adapters` {unknown}; current supported adapter names are {list(self.peft_config)}"
            )
        for name in selected_adapters or list(self.session.configs):
            directory = target if name == "default" else target / name
            if is_main_process:
                save(self.session, name, directory, save_embedding_layers=save_embedding_layers)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Add the adapter in a directory; the active one stays active. A file that does not fit is an error, nothing is skipped."""
        directory = local_directory(model_id, kwargs.get("subfolder"))
        config = _read_config(directory, None, is_trainable)
        self.session.load(config, directory, adapter_name, trainable=is_trainable, cast=autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return IncompatibleKeys([], [])

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True, **_: Any) -> None:
        """Add an adapter; the active one stays active."""
        self.session.add(peft_config, adapter_name, cast=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active and trained; the others rest."""
        if adapter_name not in self.session.configs:
            raise AdapterError(f"Adapter {adapter_name} not found.")
        self.session.set_active(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.session.delete(adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within this context the bare base answers."""
        return self.session.disabled() if self.session.configs else nullcontext()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if self.active_peft_config.is_prompt_learning:
            raise TypeError(f"Setting `requires_grad` is not supported for prompt learning methods like {self.peft_type}.")
        self.base_model.set_requires_grad(adapter_names, requires_grad)  # pyright: ignore[reportCallIssue]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) numbers."""
        numbers = [(p.requires_grad, p.numel()) for _, p in self.named_parameters()]
        return sum(n for trained, n in numbers if trained), sum(n for _, n in numbers)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, in peft's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def enable_input_require_grads(self) -> None:
        self.session.model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients enter a checkpointed model: the embedding's output requires one."""
        self.session.model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
        return model

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by peft's names."""
        model = self.session.model
        own = dict(model.named_parameters(remove_duplicate=remove_duplicate)) if recurse else {}
        called = peft_names(model, own, self._shown_prefix())
        for name, shown in called.items():
            yield (f"{prefix}." if prefix else "") + shown, own[name]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Two flat modules with all parameters by peft's names, normalizations apart: what looks for parameters to decay finds them here.

        Acting on the children (``train``, ``to``, ``apply``) acts on the real ones.
        """
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

        norms = tuple(ALL_LAYERNORM_LAYERS)
        normal = {id(p) for m in self.session.model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
        prefixes = dict.fromkeys(name.partition(".")[0] for name, _ in self.named_parameters())
        for head in prefixes:
            for cls in (nn.Module, nn.LayerNorm):
                flat = object.__new__(cls)
                nn.Module.__init__(flat)
                for name, parameter in self.named_parameters():
                    if name.partition(".")[0] == head and (id(parameter) in normal) == (cls is nn.LayerNorm):
                        flat._parameters[name.partition(".")[2]] = parameter
                yield head, flat

    def children(self) -> Iterator[nn.Module]:
        yield from self._modules.values()  # pyright: ignore[reportReturnType]

    def _shown_prefix(self) -> str:
        return "base_model.model." if isinstance(self.base_model, Tuner) else "base_model."

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """All tensors by peft's names; of tied ones the first, so that it can be written as safetensors."""
        own = self.session.model.state_dict(keep_vars=keep_vars)
        called = peft_names(self.session.model, own, self._shown_prefix())
        found: dict[str, Any] = {} if destination is None else destination
        seen: set[tuple[Any, ...]] = set()
        for key, shown in called.items():
            tensor = own[key]
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if isinstance(tensor, Tensor) and tensor.numel() else (key,)
            if place not in seen:
                seen.add(place)
                found[prefix + shown] = tensor
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` gave, or an adapter's part of it with ``strict=False``."""
        own = self.session.model.state_dict()
        called = {theirs: ours for ours, theirs in peft_names(self.session.model, own, self._shown_prefix()).items()}
        full = dict(own) if not strict else {k: v for k, v in own.items() if k not in {called[n] for n in self.state_dict()}}
        full |= {called.get(key, key): value for key, value in state_dict.items()}
        missing = [name for name in self.state_dict() if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in state_dict: {missing[:10]}")
        result = self.session.model.load_state_dict(full, strict=strict, assign=assign)
        return type(result)(missing, result.unexpected_keys)

    def base_model_state_dict(self) -> dict[str, Tensor]:
        """The base's tensors by its own names."""
        return base_state_dict(self.session.model)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Write the adapters and upload them."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            api = HfApi(token=kwargs.get("token"))
            api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=kwargs.get("commit_message"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "session"):
                raise
            return getattr(self.base_model, name)

    def __copy__(self) -> Self:
        raise AdapterError("a shallow copy of a PeftModel would share its adapters", "copy.deepcopy it")


def _read_config(directory: Path, given: PeftConfig | None, trainable: bool) -> PeftConfig:
    config: PeftConfig = PeftConfig.from_pretrained(directory) if given is None else given
    config.inference_mode = not trainable
    return config
