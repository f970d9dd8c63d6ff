"""What a recipe may say. The field descriptions are what people read; unknown keys and wrong types are errors."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from isogrid.errors import IsogridError
from isogrid.formats import named_format
from isogrid.layers.adapters import Method
from isogrid.planning.rules import Rule, ScaleChoice, scheme_from_name
from isogrid.training.distillation import ThreePhases
from isogrid.training.loftq import Start


class Part(BaseModel):
    """Base of all parts: frozen, strict about types, and without room for keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Part):
    """Something that is made by calling a Python function: a model, or data.

    >>> Source(name="digits-cnn", arguments={"channels": 8}).arguments["channels"]
    8
    """

    name: str = Field(min_length=1, description="A built-in name, or `package.module:callable`.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the call.")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict | Source):
        return value
    raise ValueError("expected a name, or the keys name and arguments")


NamedSource = Annotated[Source, BeforeValidator(_named)]
"""A Source, or its name alone."""


class RuleEntry(Part):
    """One rule; `isogrid.Rule` says what each key means."""

    match: str
    keep: Literal["float"] | None = None
    weight: str | None = None
    activation: str | None = None
    scale: ScaleChoice | None = None
    estimator: str | None = None
    range: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "RuleEntry":
        _explained(self.rule)
        return self

    def rule(self) -> Rule:
        """The rule as planning takes it."""
        return Rule(**self.model_dump())


class ScheduleEntry(Part):
    """Phases of training, in optimizer steps or shares of all steps; `isogrid.Schedule` says what each does."""

    float_steps: int = Field(default=0, ge=0)
    observe_steps: int = Field(default=0, ge=0)
    weight_only_steps: int = Field(default=0, ge=0)
    ramp_steps: int = Field(default=0, ge=0)
    freeze_batch_norm: float = Field(default=0.7, ge=0, le=1)
    freeze_ranges: float = Field(default=0.9, ge=0, le=1)


class TwoStagesEntry(Part):
    """A second stage of training, as BitNet has it; `isogrid.TwoStages` says what each key does."""

    lr: float = Field(default=2 / 3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    at: float = Field(default=0.5, ge=0, le=1)


class Optimization(Part):
    """How an optimizer moves, and for how long.

    >>> Optimization(epochs=3, batch_size=100).total_steps(1000)
    30
    """

    epochs: int | None = Field(default=None, ge=1, description="Passes over the training data; or give steps.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; or give epochs.")
    batch_size: int = Field(default=64, ge=1, description="Examples of one optimizer step, over all processes.")
    accumulation: int = Field(default=1, ge=1, description="In how many parts a process computes its share of a batch.")
    optimizer: Literal["adamw", "adamw8bit", "adam", "sgd"] = Field(
        default="adamw", description="adamw8bit: torchao's, with moments of 8 bits."
    )
    lr: float = Field(default=1e-3, gt=0, description="Learning rate of everything but scales.")
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0, description="Steps in which the learning rate rises.")
    decay: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="How the learning rate falls.")
    two_stages: TwoStagesEntry | None = Field(default=None, description="Change learning rate and decay halfway.")
    clip_norm: float | None = Field(default=None, gt=0, description="Largest norm of the gradient.")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: under autocast.")
    activation_checkpointing: bool = Field(
        default=False, description="Blocks keep their inputs alone, and compute the rest again for its gradient."
    )
    seed: int = Field(default=0, ge=0, description="Of the order of the data and of everything random.")
    workers: int = Field(default=0, ge=0, description="Processes that load data.")

    @model_validator(mode="after")
    def _has_one_length(self) -> "Optimization":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the run on this many training examples."""
        return self.steps or (self.epochs or 1) * max(1, examples // self.batch_size)


class Training(Optimization):
    """Quantization-aware training: the optimizer, and what is written down on the way."""

    scale_lr: float | None = Field(default=None, gt=0, description="By what share of itself a scale may move a step.")
    log_every: int = Field(default=10, ge=1, description="Steps between two entries for TensorBoard.")
    trackers: list[str] = Field(default_factory=list, description="Accelerate's trackers that get them too: wandb, ...")
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between two checkpoints.")


class PhasesEntry(Part):
    """QKD: a student learns by itself, then along with its teacher, then from it; see `isogrid.ThreePhases`."""

    self_study: float = Field(default=0.3, ge=0, le=1, description="Share of all steps.")
    co_study: float = Field(default=0.3, ge=0, le=1, description="Share of all steps; tutoring has the rest.")
    teacher_lr: float | None = Field(default=None, gt=0, description="Of the teacher; training.lr if not given.")

    @model_validator(mode="after")
    def _fits(self) -> "PhasesEntry":
        _explained(lambda: ThreePhases(1, self.self_study, self.co_study))
        return self


class GenerateEntry(Part):
    """Text that the float model writes, to learn from in place of the data's; `isogrid.generate_text` says how."""

    sequences: int = Field(ge=1, description="As long as the data's.")
    batch_size: int = Field(default=16, ge=1, description="Sequences that are written at a time.")


NO_PHASES = ("task", "reverse", "teacher_format", "top", "features", "relations")
"""What phases leave no room for."""


class DistillationEntry(Part):
    """Training from a teacher's distribution instead of labels; `isogrid.Distillation` says what the shares mean."""

    temperature: float = Field(default=1.0, gt=0)
    task: float = Field(default=0.0, ge=0, le=1, description="Share of the loss on labels; none by default.")
    reverse: float = Field(default=0.0, ge=0, le=1, description="Share of the reverse divergence.")
    teacher: NamedSource | None = Field(default=None, description="Another model; if not given, itself in float.")
    teacher_weights: str | None = Field(default=None, description="Of another model, a .safetensors file.")
    teacher_format: str | None = Field(default=None, description="In which its own weights rest: int8/channel.")
    top: int | None = Field(default=None, ge=1, description="Run the teacher once and keep its top classes on disk.")
    features: dict[str, float] = Field(default_factory=dict, description="Weights of losses on modules' outputs.")
    relations: dict[str, float] = Field(default_factory=dict, description="Weights of losses on their relations.")
    heads: int = Field(default=1, ge=1, description="Of the relations.")
    phases: PhasesEntry | None = Field(default=None, description="A teacher that learns along, as QKD has it.")
    generate: GenerateEntry | None = Field(default=None, description="Learn from text that the float model writes.")

    @model_validator(mode="after")
    def _makes_sense(self) -> "DistillationEntry":
        if self.top is not None and (self.features or self.relations):
            raise ValueError("top classes on disk hold no features or relations: leave out top, or these")
        if self.teacher is None and self.teacher_weights is not None:
            raise ValueError("teacher_weights are of another model: name it under teacher")
        if self.teacher is not None and self.teacher_format is not None:
            raise ValueError("teacher_format says how the float model rests: leave it out, or teacher")
        if self.teacher_format is not None:
            _explained(lambda: named_format(str(self.teacher_format)))
        if self.phases is not None:
            given = [key for key in NO_PHASES if getattr(self, key)]
            if given:
                raise ValueError(f"phases say what is learned from whom, in which order: leave out {', '.join(given)}")
        return self


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_several)]
"""Names of layers, wildcards allowed: one, or a list."""


class AdaptersEntry(Part):
    """Low-rank updates that train in place of the weights; `isogrid.add_adapters` says what each key does."""

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="Weight of the updates; rank if not given.")
    method: Method = Field(default="l4q", description="Inside the quantiser, in zero points, or beside the weight.")
    match: Patterns | None = Field(default=None, description="Layers; all quantised ones but tables if not given.")
    exclude: Patterns = Field(default_factory=list, description="Layers that are left out.")
    start: Start = Field(default="zero", description="loftq begins with what quantisation took away.")
    dora: bool = Field(default=False, description="The norms of the weight's rows train too.")
    rank_stabilized: bool = Field(default=False, description="alpha over the root of the rank.")


class BlockwiseEntry(Part):
    """Blocks train one at a time, before the scales do over codes; `isogrid.Blockwise` says what each key does."""

    match: str | None = Field(default=None, description="Pattern of the blocks; found by themselves if not given.")
    examples: int = Field(default=128, ge=1, description="Training examples that every block learns from.")
    batch_size: int = Field(default=2, ge=1, description="Examples of one step.")
    epochs: int = Field(default=2, ge=1)
    lr: float = Field(default=2e-5, gt=0)
    scale_lr: float = Field(default=1e-3, gt=0, description="By what share of itself a scale may move a step.")
    optimizer: Literal["adamw", "adamw8bit", "adam", "sgd"] = "adamw"


class FreezeEntry(Part):
    """What stays as it is in training, its weights kept as codes; `isogrid.freeze_codes` says what each key does."""

    match: Patterns | None = Field(default=None, description="Modules that freeze; all if not given.")
    exclude: Patterns = Field(default_factory=list, description="Modules among them that train.")
    scales: bool = Field(default=True, description="Whether the scales of frozen weights train.")


class Calibration(Part):
    """What chooses the ranges before training."""

    batches: int = Field(default=8, ge=1, description="Batches of training data.")
    batch_size: int = Field(default=64, ge=1)


class Recipe(Part):
    """A whole run: which model, on which data, for which runtime, in which formats, trained how.

    >>> recipe = Recipe.model_validate(
    ...     {"model": "digits-cnn", "data": "digits", "scheme": "w4a8", "training": {"epochs": 1}}
    ... )
    >>> recipe.runtime, recipe.model.name
    ('onnxruntime', 'digits-cnn')
    """

    model: NamedSource = Field(description="The float model: a built-in name or `package.module:callable`.")
    data: NamedSource = Field(description="A built-in name, or the `package.module:callable` that returns a Data.")
    checkpoint: str | None = Field(default=None, description="Float weights to start from, a .safetensors file.")
    float_training: Optimization | None = Field(default=None, description="Trains the float model first.")
    target: str | None = Field(default=None, description="The runtime; if not given, the scheme's own.")
    scheme: str = "w8a8"
    rules: list[RuleEntry] = Field(default_factory=list, description="First match wins; the scheme decides the rest.")
    calibration: Calibration = Field(default_factory=Calibration)
    schedule: ScheduleEntry = Field(default_factory=ScheduleEntry)
    distillation: DistillationEntry | None = Field(default=None, description="Learn from a teacher, not from labels.")
    adapters: AdaptersEntry | None = Field(default=None, description="Train low-rank updates and scales alone.")
    blockwise: BlockwiseEntry | None = Field(
        default=None, description="Train block by block first; `training` then moves the scales alone, over codes."
    )
    freeze: FreezeEntry | None = Field(default=None, description="Keep a part as frozen codes, and train the rest.")
    training: Training = Field(description="How long: `epochs` or `steps`; the rest has defaults.")
    controls: bool = Field(
        default=False, description="Also report PTQ, and the float model trained for as many more steps."
    )
    output: str | None = Field(default=None, description="Folder of the run; runs/<name of the recipe> if not given.")

    @property
    def runtime(self) -> str:
        """The target's name."""
        return scheme_from_name(self.scheme).target if self.target is None else self.target

    @field_validator("scheme")
    @classmethod
    def _is_known(cls, scheme: str) -> str:
        _explained(lambda: scheme_from_name(scheme))
        return scheme

    @model_validator(mode="after")
    def _starts_somewhere(self) -> "Recipe":
        if self.checkpoint is not None and self.float_training is not None:
            raise ValueError("give checkpoint or float_training, not both: a checkpoint is trained already")
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "Recipe":
        own = self.distillation is not None and self.distillation.teacher is None and self.distillation.phases is None
        if own and self.adapters is not None and self.adapters.method != "l4q":
            raise ValueError(
                f"{self.adapters.method} keeps the frozen weights as codes, so that the model cannot be its own "
                "teacher: name a teacher, or use the method l4q"
            )
        return self

    @model_validator(mode="after")
    def _trains_what_is_left(self) -> "Recipe":
        given = [key for key in ("adapters", "blockwise", "freeze") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give {given[0]} or {given[1]}, not both: each says by itself what trains")
        if given in ([], ["adapters"]):
            return self
        if self.distillation is not None and (self.distillation.teacher or self.distillation.phases) is None:
            raise ValueError(f"with {given[0]} the model has no float weights to be its own teacher: name a teacher")
        only_scales = self.freeze is None or (self.freeze.match is None and not self.freeze.exclude)
        if only_scales and self.schedule.freeze_ranges < 1:
            raise ValueError(f"with {given[0]} only scales train: set schedule.freeze_ranges to 1")
        return self


def _explained(check: Callable[[], object]) -> None:
    """Let pydantic know where an error of Isogrid happened."""
    try:
        check()
    except IsogridError as error:
        raise ValueError(str(error)) from error
