"""peft's enumerations and configurations: the same fields and defaults, for the methods that Byway has.

A field that Byway cannot honor is refused by name when the configuration is used. None is silently ignored.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from byway.compat.peft.recognized import Recognized, loaded_peft
from byway.core.disk.files import atomic_write_text, read_json
from byway.errors import AdapterError, ConfigError, listed, nearest
from byway.formats.peft.config import CONFIG

__all__ = [
    "MODEL_CLASSES", "AdaLoraConfig", "IA3Config", "LNTuningConfig", "LoraConfig", "PeftConfig", "PeftType", "PrefixTuningConfig",
    "PromptEncoderConfig", "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit",
    "TaskType", "get_peft_config", "local_directory", "own_config",
]  # fmt: skip

Names = list[str] | set[str] | str | None


class PeftType(StrEnum):
    """The methods of peft that Byway has."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


class TaskType(StrEnum):
    """The task of the model; selects the model class and the heads that are trained."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptTuningInit(StrEnum):
    """Initialization of a prompt."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(StrEnum):
    """The encoder that produces the virtual tokens of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PeftConfig(Recognized):
    """The fields of every configuration."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    kind: ClassVar[PeftType | None] = None
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    @classmethod
    def meet(cls, theirs: type[Any]) -> None:
        """Teach peft to build our model for our configurations.

        trl passes ``peft_config`` to peft's own ``get_peft_model``, which calls one of peft's model classes. Making
        their instances is delegated to Byway if the configuration is one of ours. With peft's own configurations
        nothing changes.
        """
        peft = loaded_peft()
        if peft is not None and vars(peft.PeftModel).get("__new__") is not _instead_of_pefts:
            peft.PeftModel.__new__ = _instead_of_pefts

    def __post_init__(self) -> None:
        self.peft_type = self.kind or self.peft_type
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = vars(self).get(name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        for wrong, message in self._checks():
            if wrong:
                raise ConfigError(message)
        if self.task_type is not None:
            self.task_type = TaskType(str(self.task_type))

    def _checks(self) -> Iterator[tuple[Any, str]]:
        """Yield (condition, message) for each combination of fields that is refused."""
        wrong = self.task_type is not None and str(self.task_type) not in [*TaskType]
        yield wrong, f"task_type is {str(self.task_type)!r}; it must be one of {listed(TaskType)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "runtime_config"}

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write ``adapter_config.json`` into `save_directory`, which is created if necessary."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write_text(directory / CONFIG, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration in a directory, as the class of its ``peft_type``; `kwargs` override fields."""
        found = read_json(local_directory(pretrained_model_name_or_path, subfolder) / CONFIG)
        known = {f.name for f in fields(_class_of(found))}
        return get_peft_config(found | {name: value for name, value in kwargs.items() if name in known})

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **_: Any) -> dict[str, Any]:
        """Return the fields in a JSON file, unchecked."""
        return read_json(path_json_file)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """Build a configuration of the class that ``peft_type`` names."""
        return get_peft_config(kwargs)


MODEL_CLASSES: dict[TaskType | None, type[Any]] = {}
"""The model class for each task (None: any); a class enters itself when it is defined."""


def _instead_of_pefts(cls: type[Any], model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``peft.PeftModel.__new__``: Byway's model for Byway's configurations, else a new instance of peft's class."""
    if PeftConfig not in type(peft_config).__mro__:
        return object.__new__(cls)
    task = peft_config.task_type
    return MODEL_CLASSES[None if task is None else TaskType(task)](model, peft_config, *args, **kwargs)


@dataclass
class LoraConfig(PeftConfig):
    """LoRA and, with ``use_dora``, DoRA."""

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: Names = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    kind = PeftType.LORA

    def _checks(self) -> Iterator[tuple[Any, str]]:
        yield from super()._checks()
        for name in ("layers_to_transform", "layers_pattern"):
            wrong = isinstance(self.target_modules, str) and getattr(self, name) is not None
            yield wrong, f"`{name}` cannot be used when `target_modules` is a str."
        wrong = self.layers_pattern and self.layers_to_transform is None
        yield wrong, "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        wrong = self.lora_bias and self.init_lora_weights not in (True, False)
        yield wrong, "The argument lora_bias=True is only supported with init_lora_weights=True or False"
        yield self.lora_bias and self.use_dora, "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: ``target_r`` and ``init_r`` take the place of ``r``."""

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Any = None

    kind = PeftType.ADALORA

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            warnings.warn("Note that `r` is not used in AdaLora and will be ignored; use `init_r` instead.", stacklevel=3)

    def _checks(self) -> Iterator[tuple[Any, str]]:
        yield from super()._checks()
        yield self.use_dora, "ADALORA does not support DoRA."
        yield self.loftq_config, "ADALORA does not support LOFTQ."
        yield self.orth_reg_weight <= 0, "orth_reg_weight should be greater than 0."
        steps = self.total_step or 0
        yield steps <= 0, "AdaLoRA does not work when `total_step` is None, supply a value > 0."
        message = "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or raise total_step"
        yield self.tinit >= steps - self.tfinal, message


@dataclass
class IA3Config(PeftConfig):
    """(IA)³: vectors that scale activations."""

    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: Names = None
    init_ia3_weights: bool = True

    kind = PeftType.IA3

    def _checks(self) -> Iterator[tuple[Any, str]]:
        yield from super()._checks()
        targets, inner = self.target_modules, self.feedforward_modules
        wrong = isinstance(targets, set) and isinstance(inner, set) and not inner <= targets
        yield wrong, "`feedforward_modules` should be a subset of `target_modules`"


@dataclass
class LNTuningConfig(PeftConfig):
    """Layer-norm tuning."""

    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: Names = None

    kind = PeftType.LN_TUNING


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields of methods with virtual tokens. Sizes that peft derives from the model are filled in on saving."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Names = None

    is_prompt_learning = True


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al.)."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    kind = PeftType.PROMPT_TUNING

    def __post_init__(self) -> None:
        self.prompt_tuning_init = PromptTuningInit(str(self.prompt_tuning_init))
        super().__post_init__()

    def _checks(self) -> Iterator[tuple[Any, str]]:
        yield from super()._checks()
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            yield from_text and not getattr(self, name), f"When prompt_tuning_init='TEXT', {name} can't be None"
        yield self.tokenizer_kwargs and not from_text, "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'."


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (version 1)."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    kind = PeftType.P_TUNING


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning."""

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None

    kind = PeftType.PREFIX_TUNING


_CLASSES: dict[str, type[PeftConfig]] = {
    str(cls.kind): cls
    for cls in (LoraConfig, AdaLoraConfig, IA3Config, LNTuningConfig, PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
}


def _class_of(values: dict[str, Any]) -> type[PeftConfig]:
    written = str(values.get("peft_type"))
    if written not in _CLASSES:
        raise AdapterError(f"Byway does not have peft_type {written!r} (it has {listed(_CLASSES)})", nearest(written, _CLASSES))
    return _CLASSES[written]


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """Build a configuration from a plain dict, as the class that its ``peft_type`` names."""
    kind = _class_of(config_dict)
    known = {f.name for f in fields(kind)}
    unknown = sorted(name for name, value in config_dict.items() if name not in known and value not in (None, False, "", [], {}))
    if unknown:
        warnings.warn(f"Unexpected keyword arguments {unknown} for class {kind.__name__}, these are ignored.", stacklevel=3)
    return kind(**{name: value for name, value in config_dict.items() if name in known})


def own_config(config: Any) -> Any:
    """Return `config`; for a configuration of peft itself (trl makes some) the same one of Byway's class."""
    if isinstance(config, PeftConfig):
        return config
    peft = loaded_peft()
    if peft is None or not isinstance(config, peft.PeftConfig):
        raise AdapterError(f"peft_config is a {type(config).__name__}", "pass a LoraConfig, or another configuration of byway.compat.peft")
    values = {name: value.value if isinstance(value, Enum) else value for name, value in config.to_dict().items()}
    return get_peft_config({name: value for name, value in values.items() if name != "runtime_config"})


def _plain(value: Any) -> Any:
    """Return `value` with enumerations as strings and sets as sorted lists, at any depth of lists and dicts."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        entries = [_plain(entry) for entry in value]
        return sorted(entries) if isinstance(value, set | frozenset) else entries
    return value


def local_directory(name: str | Path, subfolder: str | None = None) -> Path:
    """Return the directory of an adapter; the adapter files of a hub repository are downloaded into the cache."""
    directory = Path(name)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        patterns = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG, "adapter_model.safetensors")]
        try:
            directory = Path(snapshot_download(str(name), allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as failure:
            raise AdapterError(f"Can't find '{CONFIG}' at '{name}': no such directory, and the hub says: {failure}") from failure
    directory = directory / subfolder if subfolder else directory
    if not (directory / CONFIG).is_file():
        raise AdapterError(f"Can't find '{CONFIG}' at '{directory}'", "pass a directory written by save_pretrained")
    return directory
