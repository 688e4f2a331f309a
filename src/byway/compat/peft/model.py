"""peft's model classes: thin modules around a model that has side paths attached.

In a mixed batch (``adapter_names=[...]``) each row goes through its own adapter; ``"__base__"`` means none.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from byway.compat.peft.config import MODEL_CLASSES, PeftConfig, TaskType, local_directory, own_config
from byway.compat.peft.files import IncompatibleKeys, restore, save, write_card
from byway.compat.peft.layers import layer_of, peft_names
from byway.compat.peft.recognized import Recognized
from byway.compat.peft.session import Session
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath, side_paths, slots
from byway.errors import AdapterError

__all__ = ["PeftModel"]

BASE = "__base__"
Rows = Callable[[str, int, torch.device], Tensor]
"""(adapter name, batch size, device) → indices of its rows."""


class PeftModel(Recognized, nn.Module):
    """A model with adapters, behind peft's interface.

    Parameters and state-dict keys have peft's names; :meth:`get_base_model` returns the user's model with its own.
    Outputs have the base's length with virtual tokens too (peft returns logits for the virtual tokens of a prompt).
    """

    session: Session
    auto_class: ClassVar[str] = ""
    """The class of transformers that loads the base."""

    def __init_subclass__(cls, task: TaskType | None = None, auto_class: str = "", forward: str = "", **kwargs: Any) -> None:
        """Register `cls` for `task`. `forward` names the arguments of its forward: the columns that trainers pass.

        Arguments that are None are not passed on, so that the model's own defaults hold.
        """
        super().__init_subclass__(**kwargs)
        if task is not None:
            MODEL_CLASSES[task] = cls
            cls.auto_class = auto_class
        if not forward:
            return
        names = forward.split()

        def named(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                raise TypeError(f"{cls.__name__} takes {len(names)} positional arguments; {len(args)} were given")
            given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
            return PeftModel.forward(self, **given, **{k: v for k, v in kwargs.items() if v is not None or k not in names})

        kind = inspect.Parameter
        columns = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=None, annotation="Any") for name in names]
        parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD), *columns, kind("kwargs", kind.VAR_KEYWORD, annotation="Any")]
        named.__name__ = "forward"
        vars(named)["__signature__"] = inspect.Signature(parameters, return_annotation="Any")
        cls.forward = named

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **_: Any,
    ) -> None:
        session, peft_config = Session(model), own_config(peft_config)
        session.attach_config(peft_config, adapter_name, cast=autocast_adapter_dtype)
        self._wrap(session, prompt=peft_config.is_prompt_learning)

    def _wrap(self, session: Session, *, prompt: bool) -> None:
        super().__init__()
        vars(self)["session"] = session  # not a child: for a prompt the model itself is, otherwise it is `base_model`
        self.base_model = session.model if prompt else session
        vars(session.model)["peft_config"] = session.peft_config
        self.train(session.model.training)

    @staticmethod
    def class_for(config: PeftConfig) -> type[PeftModel]:
        """Return the class for the configuration's task."""
        return MODEL_CLASSES[None if config.task_type is None else TaskType(config.task_type)]

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
        """Attach the adapter in a directory (or hub repository) to `model`.

        Raises:
            AdapterError: a tensor has no place, or an expected one is missing; the model is unchanged.
        """
        directory = local_directory(model_id, kwargs.get("subfolder"))
        session = Session(model)
        try:
            config = session.attach_directory(directory, adapter_name, config, trainable=is_trainable, cast=autocast_adapter_dtype)
        except Exception:
            session.forget_adapters()
            raise
        chosen = PeftModel.class_for(config) if cls is PeftModel else cls
        new = object.__new__(chosen)
        PeftModel._wrap(new, session, prompt=config.is_prompt_learning)
        if not is_trainable:
            new.eval()
        return new

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.session.peft_config

    @property
    def peft_type(self) -> Any:
        return next(iter(self.peft_config.values())).peft_type

    @property
    def active_adapter(self) -> Any:
        return self.session.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active_adapters)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.session.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        named = [vars(config).get("modules_to_save") for config in self.peft_config.values()]
        return {name for names in named if names for name in ([names] if isinstance(names, str) else names)} or None

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """The side paths of the whole model, by adapter name."""
        found = nn.ModuleDict()
        for site, name, side in side_paths(self.session.model):
            if not site.path or self.peft_config[name].is_prompt_learning:
                found._modules[name] = side
        if not found:
            raise AttributeError("prompt_encoder: there is no adapter with virtual tokens")
        return found

    def get_base_model(self) -> nn.Module:
        """Return the user's model, with its side paths."""
        return self.session.model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each row of the batch its adapter (``"__base__"``: none)."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        with routed(self.session, adapter_names, batch=given[0].shape[0] if given else None):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the model; `adapter_names` as in :meth:`forward`."""
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

        The tensors are always safetensors: a pickle can run code, and peft has read safetensors for years.
        """
        target = Path(save_directory)
        if target.is_file():
            raise AdapterError(f"Provided path ({target}) should be a directory, not a file")
        if not safe_serialization:
            warnings.warn("safe_serialization=False: Byway writes adapter_model.safetensors, never pickles", stacklevel=2)
        for name in selected_adapters or ():
            if name not in self.peft_config:
                raise AdapterError(f"You passed an invalid `selected_adapters` {name!r}; the adapters are {list(self.peft_config)}")
        for name in selected_adapters or list(self.peft_config):
            if is_main_process:
                save(self.session, name, target if name == "default" else target / name, save_embedding_layers=save_embedding_layers)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, autocast_adapter_dtype: bool = True, **kwargs: Any
    ) -> IncompatibleKeys:
        """Add the adapter in a directory; the active one stays active.

        If there is an adapter of this name, its tensors are overwritten: trainers resume from a checkpoint in this way.

        Raises:
            AdapterError: a tensor has no place, or an expected one is missing.
        """
        directory = local_directory(model_id, kwargs.get("subfolder"))
        if adapter_name in self.peft_config:
            restore(self.session, adapter_name, directory)
        else:
            self.session.attach_directory(directory, adapter_name, trainable=is_trainable, cast=autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return IncompatibleKeys([], [])

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True, **_: Any) -> None:
        """Add an adapter; the active one stays active."""
        self.session.attach_config(own_config(peft_config), adapter_name, cast=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active and trainable; the others are frozen."""
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} not found.")
        self.session.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.session.delete_adapter(adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within this context the bare base answers."""
        return self.session.without_adapters() if self.peft_config else nullcontext()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if self.active_peft_config.is_prompt_learning:
            raise TypeError(f"Setting `requires_grad` is not supported for prompt learning methods like {self.peft_type}.")
        self.session.set_requires_grad(adapter_names, requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters."""
        sizes = [(parameter.requires_grad, parameter.numel()) for _, parameter in self.named_parameters()]
        return sum(size for trainable, size in sizes if trainable), sum(size for _, size in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients enter a checkpointed model: the embedding's output requires one."""
        self.session.model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
        return model

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by peft's names."""
        own = dict(self.session.model.named_parameters(remove_duplicate=remove_duplicate)) if recurse else {}
        for name, shown in self._shown(own).items():
            yield (f"{prefix}." if prefix else "") + shown, own[name]

    def _shown(self, own: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the model's own key → peft's key."""
        return peft_names(self.session.model, own, "base_model.model." if self.base_model is self.session else "base_model.")

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield two flat modules with all parameters by peft's names, those of norms apart from the others.

        Code that looks for the parameters to decay walks the children by name and finds them here. Acting on
        :meth:`children` (``train``, ``to``, ``apply``) acts on the real modules.
        """
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

        norms = tuple(ALL_LAYERNORM_LAYERS)
        in_norm = {id(p) for m in self.session.model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
        flat: dict[tuple[str, bool], nn.Module] = {}
        for name, parameter in self.named_parameters():
            head, _, rest = name.partition(".")
            for is_norm in (False, True):
                if (head, is_norm) not in flat:
                    flat[head, is_norm] = object.__new__(nn.LayerNorm if is_norm else nn.Module)
                    nn.Module.__init__(flat[head, is_norm])
            flat[head, id(parameter) in in_norm]._parameters[rest] = parameter
        yield from ((head, module) for (head, _), module in flat.items())

    def children(self) -> Iterator[nn.Module]:
        yield from self._modules.values()  # pyright: ignore[reportReturnType]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """Return all tensors by peft's names; of tied ones the first, so that they can be written as safetensors."""
        own = self.session.model.state_dict(keep_vars=keep_vars)
        found: dict[str, Any] = {} if destination is None else destination
        seen: set[tuple[Any, ...]] = set()
        for key, shown in self._shown(own).items():
            tensor = own[key]
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if isinstance(tensor, Tensor) and tensor.numel() else (key,)
            if place not in seen:
                seen.add(place)
                found[prefix + shown] = tensor
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the result of :meth:`state_dict`, or with ``strict=False`` a part of it."""
        own, expected = self.session.model.state_dict(), self.state_dict()
        own_names = {shown: key for key, shown in self._shown(own).items()}
        missing = [name for name in expected if name not in state_dict]
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in state_dict: {missing[:10]}")
        covered = {own_names[name] for name in expected} if strict else set()
        full = {key: tensor for key, tensor in own.items() if key not in covered}
        full |= {own_names.get(name, name): tensor for name, tensor in state_dict.items()}
        result = self.session.model.load_state_dict(full, strict=strict, assign=assign)
        return type(result)(missing, result.unexpected_keys)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write a model card into `output_dir`, unless there is one."""
        write_card(self.session, self.active_adapters[0], Path(output_dir))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Write the adapters and upload them."""
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
        raise AdapterError("a shallow copy of a PeftModel would share its adapters", "use copy.deepcopy")


MODEL_CLASSES[None] = PeftModel


class _Routed(SidePath):
    """Send each row of a module's batch through the side paths of its own adapter."""

    def __init__(self, rows: Rows, sides: dict[str, list[SidePath]]) -> None:
        super().__init__()
        self.rows = rows
        self.by_name = sides  # a plain dict: these side paths belong to their slot

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        def act(sides: list[SidePath], own: dict[str, Any], part: Tensor) -> Tensor:
            for side in sides:
                part = side.after(own, part)
            return part

        return self._by_rows(inputs, out, act)

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        out = type(module).forward(module, **inputs)
        return self._by_rows(inputs, out, lambda sides, own, part: sides[0].instead(module, own).to(part.dtype))

    def _by_rows(self, inputs: dict[str, Any], out: Any, act: Callable[[list[SidePath], dict[str, Any], Tensor], Tensor]) -> Tensor:
        if not isinstance(out, Tensor):
            raise AdapterError("adapter_names: an adapted module does not return a tensor, so its rows cannot be told apart")
        batch = out.shape[0]
        for name, sides in self.by_name.items():
            rows = self.rows(name, batch, out.device)
            if len(rows):
                own = {k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == batch else v for k, v in inputs.items()}
                out = out.index_copy(0, rows, act(sides, own, out[rows]))
        return out


@contextmanager
def routed(session: Session, names: Sequence[str] | None, *, repeats: bool = False, batch: int | None = None) -> Iterator[None]:
    """Within this context row i of every batch goes through adapter ``names[i]``; None changes nothing.

    In a batch k times as long as the names (beam search, `repeats`) each name has k rows.

    Raises:
        AdapterError: a name is unknown, the model is in training mode or merged, or an adapter has virtual tokens.
    """
    if names is None:
        yield
        return
    wanted = [name for name in dict.fromkeys(names) if name != BASE]
    unknown = [name for name in wanted if name not in session.peft_config]
    if unknown:
        raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    if session.model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = session.adapted_layers()
    if any(layer.merged for layer in layers):
        raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
    if any(session.peft_config[name].is_prompt_learning for name in wanted):
        raise AdapterError("adapter_names: prompts cannot be mixed in a batch")

    def rows(name: str, size: int, device: torch.device) -> Tensor:
        times, rest = divmod(size, len(names))
        if rest or (times != 1 and not repeats):
            raise AdapterError(f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {size}")
        return torch.tensor([row for row in range(size) if names[row // times] == name], dtype=torch.long, device=device)

    if batch is not None:
        rows(BASE, batch, torch.device("cpu"))
    try:
        for _, module, slot in slots(session.model):
            sides = [(name, side) for name, side in slot.sides() if name in wanted]
            if layer_of(module).disabled:
                continue
            if any(side.overrides(verb) for _, side in sides for verb in ("before", "attend")):
                raise AdapterError(f"adapter_names: {type(sides[0][1]).__name__} cannot be mixed in a batch")
            afters: dict[str, list[SidePath]] = {}
            for name, side in sides:
                if side.overrides("after"):
                    afters.setdefault(name, []).append(side)
            copies: dict[str, list[SidePath]] = {name: [side] for name, side in sides if isinstance(side, TrainedCopy)}
            slot.befores = slot.attends = ()
            slot.afters = (_Routed(rows, afters),) if afters else ()
            slot.answering = (_Routed(rows, copies),) if copies else ()
        yield
    finally:
        for layer in layers:
            layer.apply()
