"""peft's configurations: the same field names and defaults, for the methods that Byway has.

A field that Byway cannot honor is refused when the configuration is used, by name; nothing is ignored in silence.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from byway.compat.peft.types import PeftType, PromptEncoderReparameterizationType, PromptTuningInit, TaskType, text
from byway.disk.files import atomic_write_text, read_json
from byway.errors import AdapterError, ConfigError, listed, nearest

__all__ = [
    "CONFIGS",
    "AdaLoraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "PeftConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "get_peft_config",
    "local_directory",
]

CONFIG_NAME = "adapter_config.json"
Names = list[str] | set[str] | str | None


@dataclass
class PeftConfig:
    """What all configurations have."""

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

    def __post_init__(self) -> None:
        if self.kind is not None:
            self.peft_type = self.kind
        if self.task_type is not None:
            if str(self.task_type) not in [*TaskType]:
                raise ConfigError(f"task_type is {str(self.task_type)!r}; it must be one of {listed(TaskType)}")
            self.task_type = TaskType(str(self.task_type))

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {f.name: text(getattr(self, f.name)) for f in fields(self)}

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write ``adapter_config.json`` into `save_directory`, which is made if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write_text(directory / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration in a directory, as the class that its ``peft_type`` names; further keywords override its fields."""
        directory = local_directory(pretrained_model_name_or_path, subfolder)
        found = read_json(directory / CONFIG_NAME)
        own = {k: v for k, v in kwargs.items() if k in {f.name for f in fields(_class_of(found))}}
        return _construct({**found, **own})

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **_: Any) -> dict[str, Any]:
        """The fields in a JSON file, unchecked."""
        return read_json(path_json_file)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A configuration of the class that ``peft_type`` names."""
        return _construct(kwargs)


def local_directory(name: str | Path, subfolder: str | None = None) -> Path:
    """The directory of an adapter: a local one, or a hub repository, fetched (only its adapter files) into the hub's cache."""
    directory = Path(name)
    if not directory.is_dir():
        directory = _from_hub(str(name), subfolder)
    directory = directory / subfolder if subfolder else directory
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(f"Can't find '{CONFIG_NAME}' at '{directory}'", "name a directory that save_pretrained has written")
    return directory


def _from_hub(name: str, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        return Path(snapshot_download(name, allow_patterns=[prefix + CONFIG_NAME, prefix + "adapter_model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as failure:
        raise AdapterError(f"Can't find '{CONFIG_NAME}' at '{name}': no such directory, and the hub says: {failure}") from failure


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_targets(self)
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError("The argument lora_bias=True is only supported with init_lora_weights=True or False")
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "runtime_config"}


def _check_targets(config: Any) -> None:
    """Lists of names become sets, as in peft; pairs of fields that cannot go together are refused."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        setattr(config, name, set(value) if isinstance(value, list | tuple) else value)
    if isinstance(config.target_modules, str):
        for other in ("layers_to_transform", "layers_pattern"):
            if getattr(config, other) is not None:
                raise ValueError(f"`{other}` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: ``r`` is not used, ``target_r`` and ``init_r`` are."""

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
        if self.use_dora:
            raise ValueError("ADALORA does not support DoRA.")
        if self.loftq_config:
            raise ValueError("ADALORA does not support LOFTQ.")
        if self.orth_reg_weight <= 0:
            raise ValueError("orth_reg_weight should be greater than 0.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or raise total_step"
            )
        if self.r != 8:
            warnings.warn("Note that `r` is not used in AdaLora and will be ignored; use `init_r` instead.", stacklevel=3)


@dataclass
class IA3Config(PeftConfig):
    """(IA)³: learned vectors that scale activations."""

    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: Names = None
    init_ia3_weights: bool = True

    kind = PeftType.IA3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        own, inner = self.target_modules, self.feedforward_modules
        if isinstance(own, set) and isinstance(inner, set) and not inner <= own:
            raise ValueError("`feedforward_modules` should be a subset of `target_modules`")


@dataclass
class LNTuningConfig(PeftConfig):
    """Layer-norm tuning."""

    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: Names = None

    kind = PeftType.LN_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the methods with virtual tokens share; the sizes that peft fills in are filled in when the adapter is saved."""

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
        super().__post_init__()
        self.prompt_tuning_init = PromptTuningInit(str(self.prompt_tuning_init))
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, name):
                raise ValueError(f"When prompt_tuning_init='TEXT', {name} can't be None")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


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


CONFIGS: dict[str, type[PeftConfig]] = {
    str(cls.kind): cls
    for cls in (LoraConfig, AdaLoraConfig, IA3Config, LNTuningConfig, PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
}
"""peft_type → its class."""


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The configuration that a plain dict describes, as the class that its ``peft_type`` names."""
    return _construct(config_dict)


def _class_of(values: dict[str, Any]) -> type[PeftConfig]:
    written = values.get("peft_type")
    kind = CONFIGS.get(str(written))
    if kind is None:
        raise AdapterError(f"peft_type {written!r} is not one that Byway has ({listed(CONFIGS)})", nearest(str(written), CONFIGS))
    return kind


def _construct(values: dict[str, Any]) -> Any:
    kind = _class_of(values)
    own = {f.name for f in fields(kind)}
    unknown = sorted(name for name, value in values.items() if name not in own and value not in (None, False, "", [], {}))
    if unknown:
        warnings.warn(f"Unexpected keyword arguments {unknown} for class {kind.__name__}, these are ignored.", stacklevel=3)
    return kind(**{name: value for name, value in values.items() if name in own})
