"""What a model is, as frozen data: one fact, one field; everything that follows from others is a property.

`ModelConfig.from_dict` refuses unknown keys with "did you mean"; only the reader of published run folders
(`dit4dit.checkpoints.published`) ignores keys it does not know, because those files carry many that nothing reads.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dit4dit.errors import ConfigError, did_you_mean, shown

Config = TypeVar("Config")

TrainingMode = Literal["joint", "action", "video"]
TimeDistribution = Literal["logit_normal", "uniform"]


def _check_sizes(config: Any, name: str, positive: tuple[str, ...] = ()) -> None:
    """ConfigError when a size (any integer field, alone or in a tuple) is not positive, or a float not finite.

    positive: fields whose floats must be more than 0.
    """
    prefix = f"{name}." if name else ""
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        for size in value if isinstance(value, tuple) else (value,):
            if isinstance(size, int) and not isinstance(size, bool) and size < 1:
                raise ConfigError(f"{prefix}{field_.name}: expected at least 1, got {value}")
            if isinstance(size, float) and not math.isfinite(size):
                raise ConfigError(f"{prefix}{field_.name}: expected a finite number, got {value}")
            if field_.name in positive and not size > 0:
                raise ConfigError(f"{prefix}{field_.name}: expected more than 0, got {value}")


@dataclass(frozen=True)
class TextConfig:
    """The text encoder: the language half of Qwen2.5-VL (released: Cosmos-Reason1-7B's)."""

    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    intermediate_size: int = 18944
    vocab_size: int = 152064
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 128000
    max_length: int = 512
    """Tokens a prompt is padded or truncated to; there is no attention mask, so it changes the result."""

    def __post_init__(self) -> None:
        _check_sizes(self, "text", ("rope_theta", "rms_norm_eps"))
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"text.num_heads: expected a divisor of hidden_size = {self.hidden_size}, got {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"text.num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        half = self.hidden_size // self.num_heads // 2
        if sum(self.mrope_section) != half:
            raise ConfigError(
                f"text.mrope_section: expected sizes that add up to {half}, half of hidden_size / num_heads, got "
                f"{self.mrope_section}"
            )

    @property
    def embed_width(self) -> int:
        """Width of a prompt embedding: the hidden states of all layers, concatenated."""
        return self.hidden_size * self.num_layers


@dataclass(frozen=True)
class VaeConfig:
    """The Wan 2.1 causal video VAE, under diffusers' names (`AutoencoderKLWan`)."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    def __post_init__(self) -> None:
        _check_sizes(self, "vae", ("latents_std",))
        for name in ("latents_mean", "latents_std"):
            got = len(getattr(self, name))
            if got != self.z_dim:
                raise ConfigError(f"vae.{name}: expected z_dim = {self.z_dim} values, got {got}")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first one, which stands alone."""
        return int(2 ** sum(self.temperal_downsample))


@dataclass(frozen=True)
class VideoDitConfig:
    """The video diffusion transformer (Cosmos-Predict2.5), stripped to what varies between its checkpoints."""

    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 128
    mlp_ratio: float = 4.0
    adaln_lora_dim: int = 256
    text_in: int = 100352
    """Width of the prompt embeddings that the projection takes."""
    text_dim: int = 1024
    """Width after the projection: what the cross-attentions see."""
    latent_channels: int = 16
    patch: int = 2
    """Rows and columns of latents in one token."""
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)
    max_size: tuple[int, int, int] = (128, 240, 240)
    """Largest latent clip (frames, rows, columns)."""
    learned_positions: bool = False
    """Add learned embeddings of row and column to the tokens. Cosmos-Predict2.5 has none; a small model that learns from little
    finds places many times sooner with them than through the rotary angles alone."""

    def __post_init__(self) -> None:
        _check_sizes(self, "dit", ("mlp_ratio", "rope_scale"))
        if self.head_dim % 2 or self.head_dim < 12:
            raise ConfigError(
                "dit.head_dim: expected an even number of at least 12 (rotary angles of frame, row and column), got "
                f"{self.head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class HeadConfig:
    """The flow-matching action head. `dit_b` and `dit_l` give the published sizes."""

    num_layers: int = 16
    num_heads: int = 12
    head_dim: int = 64
    hidden_size: int = 2560
    """Hidden width of the state encoder and the action decoder."""
    output_dim: int = 2560
    action_dim: int = 32
    action_horizon: int = 16
    state_dim: int | None = 64
    """Values of the encoded, padded state; None for a model without a state token."""
    context_dim: int = 2048
    """Width of the backbone features that the even blocks attend to."""
    interleave_self_attention: bool = True
    add_pos_embed: bool = True
    max_seq_len: int = 1024
    dropout: float = 0.2
    final_dropout: bool = True
    num_inference_timesteps: int = 4
    num_timestep_buckets: int = 1000

    def __post_init__(self) -> None:
        _check_sizes(self, "head")
        if self.width % 2:
            raise ConfigError(
                f"head.head_dim: expected num_heads x head_dim to be even, got {self.num_heads} x {self.head_dim}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head.dropout: expected a share from 0 to below 1, got {self.dropout}")
        if self.num_inference_timesteps > self.num_timestep_buckets:
            raise ConfigError(
                f"head.num_inference_timesteps: at most num_timestep_buckets = {self.num_timestep_buckets}, or two steps would "
                f"have the same time, got {self.num_inference_timesteps}"
            )
        if self.add_pos_embed and self.action_horizon > self.max_seq_len:
            raise ConfigError(
                f"head.max_seq_len: expected at least action_horizon = {self.action_horizon}, got {self.max_seq_len}; raise "
                "--model.head.max_seq_len, or lower --model.head.action_horizon"
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Tokens in one pass: the actions, and the state token where there is one."""
        return self.action_horizon + (self.state_dim is not None)

    @classmethod
    def dit_b(cls, **kwargs: Any) -> HeadConfig:
        """768 wide, 12 heads x 64."""
        return cls(num_heads=12, head_dim=64, **kwargs)

    @classmethod
    def dit_l(cls, **kwargs: Any) -> HeadConfig:
        """1536 wide, 32 heads x 48."""
        return cls(num_heads=32, head_dim=48, **kwargs)


@dataclass(frozen=True)
class FlowConfig:
    """How training draws its times, and what the loss is made of."""

    training: TrainingMode = "joint"
    beta_alpha: float = 1.5
    beta_beta: float = 1.0
    time_scale: float = 0.999
    """Action times are Beta draws divided by this, so they reach 1.001; released heads were trained so."""
    time_distribution: TimeDistribution = "logit_normal"
    high_sigma_ratio: float | None = 0.05
    high_sigma_min: float | None = 0.98
    repeated_diffusion_steps: int = 4
    future_video_weight: float = 1.0
    video_every: int = 1
    """The video loss sees every how manieth sample of a batch; the published models' saw all."""
    action_grad_to_backbone: bool = False
    """Let the action loss reach the backbone; the published models never did."""

    def __post_init__(self) -> None:
        _check_sizes(self, "flow", ("beta_alpha", "beta_beta", "time_scale"))
        if (self.high_sigma_ratio is None) != (self.high_sigma_min is None):
            raise ConfigError(
                "flow.high_sigma_ratio and flow.high_sigma_min: set both or neither, got "
                f"{self.high_sigma_ratio} and {self.high_sigma_min}"
            )
        if self.training not in typing.get_args(TrainingMode):
            raise ConfigError(f"flow.training: expected one of joint, action, video, got {shown(self.training)}")
        if self.time_distribution not in typing.get_args(TimeDistribution):
            raise ConfigError(
                f"flow.time_distribution: expected logit_normal or uniform, got {shown(self.time_distribution)}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. Sizes of pictures are per view; how many views there are is the embodiment's business."""

    text: TextConfig = field(default_factory=TextConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    dit: VideoDitConfig = field(default_factory=VideoDitConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    frames: int = 9
    """F: pixel frames the model was trained with; the first is seen, the others are noise or future."""
    image_size: tuple[int, int] = (224, 224)
    """(height, width) that each view is resized to before the views are joined along the width."""
    extract_layer: int = 17
    """Zero-based block whose output is the feature map."""
    conditional_frame_timestep: float = 0.0001
    sigma_max: float = 200.0
    """Largest sigma of the scheduler; the time of the noisy frames is sigma_max / (1 + sigma_max)."""

    def __post_init__(self) -> None:
        for name, value in (
            ("conditional_frame_timestep", self.conditional_frame_timestep),
            ("sigma_max", self.sigma_max),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected a finite number of at least 0, got {value}")
        if self.frames < 1 or min(self.image_size) < 1:
            raise ConfigError(f"frames and image_size: expected at least 1, got {self.frames} and {self.image_size}")
        if (self.frames - 1) % self.vae.temporal_factor:
            raise ConfigError(
                f"frames: expected 1 + a multiple of {self.vae.temporal_factor} (one latent frame holds that many), "
                f"got {self.frames}"
            )
        if not 0 <= self.extract_layer < self.dit.num_layers:
            raise ConfigError(f"extract_layer: expected 0 to {self.dit.num_layers - 1}, got {self.extract_layer}")
        if self.head.context_dim != self.dit.width:
            raise ConfigError(
                f"head.context_dim: expected the backbone's {self.dit.width}, got {self.head.context_dim}"
            )
        if self.dit.text_in != self.text.embed_width:
            raise ConfigError(
                f"dit.text_in: expected the text encoder's {self.text.embed_width}, got {self.dit.text_in}"
            )
        if self.dit.latent_channels != self.vae.z_dim:
            raise ConfigError(
                f"dit.latent_channels: expected the VAE's {self.vae.z_dim}, got {self.dit.latent_channels}"
            )
        for side in self.image_size:
            if side % self.pixels_per_token:
                raise ConfigError(f"image_size: expected multiples of {self.pixels_per_token}, got {self.image_size}")
        self.latent_size(*self.image_size)
        if self.latent_frames > self.dit.max_size[0]:
            raise ConfigError(
                f"frames: at most {self.dit.max_size[0]} latent frames (the video transformer's max_size), got "
                f"{self.latent_frames} from {self.frames} frames"
            )

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // self.vae.temporal_factor + 1

    @property
    def pixels_per_token(self) -> int:
        return self.vae.spatial_factor * self.dit.patch

    @property
    def sigma(self) -> float:
        """Time of the noisy frames in the feature pass, before it is cast to the backbone's dtype."""
        return self.sigma_max / (1.0 + self.sigma_max)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a joined picture of `height` x `width` pixels."""
        for name, side in (("height", height), ("width", width)):
            if side % self.pixels_per_token:
                raise ConfigError(
                    f"image {name}: expected a multiple of {self.pixels_per_token} pixels, got {side}; resize the picture"
                )
        size = (height // self.vae.spatial_factor, width // self.vae.spatial_factor)
        if size[0] > self.dit.max_size[1] or size[1] > self.dit.max_size[2]:
            most = tuple(self.vae.spatial_factor * side for side in self.dit.max_size[1:])
            raise ConfigError(
                f"image_size: at most {most[0]} x {most[1]} pixels, got {height} x {width} (all views side by side; the video "
                f"transformer's max_size is {self.dit.max_size[1]} x {self.dit.max_size[2]} latents); make the images smaller"
            )
        return size

    def noise_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one request's draws (`dit4dit.noise.Noise`) for a joined picture of `height` x `width` pixels."""
        rows, columns = self.latent_size(height, width)
        return {
            "posterior": (self.vae.z_dim, 1, rows, columns),
            "latent": (self.vae.z_dim, self.latent_frames, rows, columns),
            "action": (self.head.action_horizon, self.head.action_dim),
        }

    def tokens(self, views: int = 1) -> int:
        """Backbone tokens S for `views` joined views."""
        rows, columns = self.latent_size(self.image_size[0], self.image_size[1] * views)
        return self.latent_frames * (rows // self.dit.patch) * (columns // self.dit.patch)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config") -> ModelConfig:
        """The inverse of `to_dict`. Unknown keys and wrong types raise ConfigError naming `where`."""
        return build_within(cls, data, where)


LATER = "later"
"""Mark of a field that came after hashes were stored: `field(default=..., metadata={LATER: True})`; see `hashed_text`."""
_NAMES = {"text": "TextConfig", "vae": "VaeConfig", "dit": "VideoDitConfig", "head": "HeadConfig", "flow": "FlowConfig"}


def hashed_text(name: str, config: Any) -> str:
    """A configuration as the text that hashes are made of: name(field=value, ...), every field by its name, in their order.

    Keys of caches and prompt packs, fingerprints of runs and hashes of checkpoints are made of it, so what is stored is found as
    long as it stays the same. It equals the dataclass's repr, of which the first ones were made, with the class names written
    out: a class can be moved and renamed, and no hash needs an old value beside a new one. A field that is added later must not
    change the text of configurations that do not use it: marked `LATER`, it is left out where it has its default.
    """
    said = []
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if field_.metadata.get(LATER) and value == field_.default:
            continue
        inner = _NAMES.get(field_.name)
        said.append(f"{field_.name}={repr(value) if inner is None else hashed_text(inner, value)}")
    return f"{name}({', '.join(said)})"


def build_within(cls: type[Config], data: Any, where: str) -> Config:
    """`build`, whose errors all name `where`: those of values that contradict each other too."""
    try:
        return build(cls, data, where)
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None


def build(cls: type[Config], data: Any, where: str) -> Config:
    """Make the frozen dataclass `cls` from JSON data; errors name the dotted key below `where`.

    Raises:
        ConfigError: an unknown key (with a suggestion), a key that is needed and missing, a value of another type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {shown(key)}{did_you_mean(key, list(fields))}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {shown(missing[0])}; add it")
    return cls(**{key: _coerce(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {shown(value)}")
        if Ellipsis not in args and len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
        kinds = [args[0]] * len(value) if Ellipsis in args else args
        return tuple(
            _coerce(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {shown(value)}")
        return value
    if type(None) in args:
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected a number that a float can hold, got a larger one") from None
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    return value
