"""The public functions: names are resolved here, and the floors below are joined."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isogrid.errors import MissingExtraError, PlanError, TargetError
from isogrid.formats import Format, named_format
from isogrid.initialization import learn_rotations, rotate, smooth
from isogrid.layers.bitnet import BitLinear as BitLinear
from isogrid.planning import Plan, Rule, Scheme, scheme_from_name
from isogrid.planning.adopt import adopt as adopt
from isogrid.planning.arguments import arguments_of, without_values
from isogrid.planning.capture import capture
from isogrid.planning.convert import convert as convert
from isogrid.planning.exchange import apart
from isogrid.planning.lending import lending
from isogrid.planning.placement import Placement
from isogrid.planning.state import is_prepared, prepared_state
from isogrid.planning.state import unplanned as unplanned
from isogrid.search import fit_lq_lora, fit_types
from isogrid.targets import Artifact, LoadedModel, load_artifact, target_from_name
from isogrid.targets.checkpoints.adopting import adopt_checkpoint as adopt_checkpoint
from isogrid.training import (
    AdapterReport,
    Blockwise,
    Distillation,
    LayerLosses,
    Phase,
    Schedule,
    TeacherCache,
    ThreePhases,
    TwoStages,
    adapter_report,
    add_adapters,
    calibrate,
    checkpoint_activations,
    estimate,
    freeze_codes,
    generate_text,
    load_peft,
    merge_adapters,
    parameter_groups,
    prepare,
    reestimate_batch_norm,
    restore,
    save,
    save_peft,
    store_teacher,
    teacher,
    to_bitnet,
    train_blockwise,
    train_blockwise_on_disk,
    use_adapters,
)
from isogrid.verification import MergeDifference, VerificationReport, merge_difference, verify_artifact


def format(name: str) -> Format:
    """The format of a name: `int4/group32`, `uint8/tensor`, `q4_k`, `nvfp4`.

    Raises:
        FormatError: there is no such format; the message shows the nearest names and the grammar.

    >>> format("int4/group32").bits_per_value((64, 128))
    5.0
    """
    return named_format(name)


def plan(
    model: nn.Module,
    target: str | None = None,
    scheme: str | Scheme | Sequence[Rule] = "w8a8",
    rules: Sequence[Rule] = (),
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    strict: bool = False,
) -> Plan:
    """Decide for every weight and activation of a model in which format it is stored, and say why.

    The model runs once on the example inputs; it is not changed.

    Args:
        model: float; on the meta device it needs no memory.
        target: the runtime, by name; the scheme's own if not given, which is ONNX Runtime for most.
        scheme: a scheme's name, or rules, which then stand before the default scheme `w8a8`.
        rules: exceptions from the scheme; the first that matches wins.
        example_inputs: arguments of the model's forward: a tuple, or a dictionary of keyword arguments. They are
            tensors, None, numbers, strings, and tuples, lists and dictionaries of these; all but the tensors are fixed
            from then on.
        strict: an error where the scheme's format does not fit a weight. Otherwise schemes for llama.cpp fall back to
            another format as it does, with the reason in the plan; all other schemes are strict in any case.

    Returns:
        A plan; `print(plan)` shows every site with its format and reason, and all that stays float.

    Raises:
        PlanError: a rule matches nothing, or the scheme is unknown.
        TargetError: the target cannot run a format.
        FormatError: a format does not fit a weight.
        CaptureError: the model does not run on the example inputs.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [site.name for site in plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),)).sites]
    ['0.weight', '2.weight', '0.output', '0.input']
    """
    if is_prepared(model):
        raise PlanError("The model is prepared already; plan the float model.")
    if not isinstance(scheme, str | Scheme):
        scheme, rules = "w8a8", (*rules, *scheme)
    chosen = scheme_from_name(scheme) if isinstance(scheme, str) else scheme
    runtime = target_from_name(chosen.target if target is None else target)
    chosen = runtime.scheme_for(chosen)
    model, example_inputs = without_values(model, example_inputs)
    arguments = arguments_of(model, example_inputs)
    with apart(model):
        graph = capture(model, example_inputs)
        with lending(model, graph.lent):
            return Placement(model, graph, runtime, chosen, tuple(rules), arguments, strict).plan()


def export(model: nn.Module, path: str | Path, **options: Any) -> Artifact:
    """Write the artefact of a prepared model for its plan's target, with a sidecar `<path>.json`.

    Args:
        model: prepared and calibrated.
        path: of the file.
        options: what the target takes beside: for llama.cpp `tokenizer` and `base`; see its `export`.

    Raises:
        NotCalibratedError, NonFiniteError: see `convert`.
        TargetError: the model cannot be exported, or the target takes no such option.
    """
    state = prepared_state(model)
    write: Callable[..., Artifact] = target_from_name(state.plan.target).export
    known = [n for n, parameter in signature(write).parameters.items() if parameter.kind is Parameter.KEYWORD_ONLY]
    for name in options.keys() - known:
        takes = f"takes {' and '.join(known)}" if known else "takes none"
        raise TargetError(f"isogrid.export was given {name}=, and the target {state.plan.target} {takes}.")
    return write(convert(model), state.plan, path, **options)


def load(path: str | Path) -> LoadedModel:
    """An artefact in its runtime, with the settings it was trained for; call it with tensors.

    Raises:
        ArtifactError: the file or its sidecar is missing, corrupt or truncated.
    """
    return load_artifact(path)


def verify(
    model: nn.Module,
    artifact: Artifact | str | Path,
    batches: Iterable[Any],
    metric: Callable[[Tensor, Any], float] | None = None,
) -> VerificationReport:
    """Run an artefact in its runtime on data and hold everything it computes against `convert(model)`.

    Args:
        model: prepared; the artefact was exported from it.
        artifact: of `export`, or its path.
        batches: as for `calibrate`.
        metric: of (outputs, batch), averaged over batches and reported for both.

    Returns:
        A report that prints, has `to_json()`, and is falsy where any bound fails.

    Raises:
        ArtifactError: the artefact is missing, corrupt or truncated.
    """
    return verify_artifact(model, artifact, batches, metric)


def to_torchao(model: nn.Module) -> nn.Module:
    """A prepared weight-only model with torchao's tensors as weights, for eager use and for torchao's own tools.

    It computes what `convert(model)` does, bit for bit: the codes and scales are those that were trained. Every Linear
    is a torch.nn.Linear again, whose weight is an `IntxUnpackedToInt8Tensor`.

    Raises:
        PlanError, NotCalibratedError, NonFiniteError: see `convert`.
        TargetError: layers were trained on integer activations, which torchao rounds by another rule.
        MissingExtraError: torchao is not installed.
    """
    try:
        from isogrid.targets.torchao import with_torchao_weights
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"isogrid.to_torchao needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'isogrid[torchao]'"
        ) from error
    return with_torchao_weights(convert(model))


__all__ = [
    "AdapterReport",
    "Artifact",
    "BitLinear",
    "Blockwise",
    "Distillation",
    "LayerLosses",
    "MergeDifference",
    "Phase",
    "Plan",
    "Rule",
    "Schedule",
    "TeacherCache",
    "ThreePhases",
    "TwoStages",
    "VerificationReport",
    "adapter_report",
    "add_adapters",
    "adopt",
    "adopt_checkpoint",
    "calibrate",
    "checkpoint_activations",
    "convert",
    "estimate",
    "export",
    "fit_lq_lora",
    "fit_types",
    "format",
    "freeze_codes",
    "generate_text",
    "learn_rotations",
    "load",
    "load_peft",
    "merge_adapters",
    "merge_difference",
    "parameter_groups",
    "plan",
    "prepare",
    "reestimate_batch_norm",
    "restore",
    "rotate",
    "save",
    "save_peft",
    "smooth",
    "store_teacher",
    "teacher",
    "to_bitnet",
    "to_torchao",
    "train_blockwise",
    "train_blockwise_on_disk",
    "unplanned",
    "use_adapters",
    "verify",
]
