"""A Trainer with the callback trains what it says, evaluates what is deployed, and resumes bit for bit."""

import copy
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator

import isogrid as ig
from isogrid.errors import DistillationError, PlanError
from isogrid.integrations.transformers import QAT
from isogrid.recipes.tokens import byte_level_tokenizer
from isogrid.training.distillation import cross_entropy

ROOT = Path(__file__).parents[2]
GROUPS_OF_32 = ig.Rule(match="Linear", weight="int4/group32:scale=bfloat16")
SCHEDULE = {"weight_only_steps": 1, "ramp_steps": 2, "freeze_ranges": 0.7}


def tiny() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def examples(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(300, (8,), generator=generator)
        labels = ids.clone()
        labels[: 1 + number % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "save_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder: Path, qat: dict[str, Any] | None = None, callbacks: Any = (), **options: Any) -> Trainer:
    model, data, args = tiny(), examples(), arguments(folder, **options)
    callback = QAT(model, [default_data_collator(data[:4])], scheme="w4a16", **{"schedule": SCHEDULE, **(qat or {})})
    return Trainer(
        model, args, train_dataset=data, eval_dataset=examples(6, seed=1), callbacks=[callback, *callbacks],
        optimizer_cls_and_kwargs=callback.optimizer(args),
    )  # fmt: skip


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_a_resumed_run_has_the_losses_it_would_have_had(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert len(losses(whole)) == 6 and whole.model.isogrid_step == 6
    for step in (2, 4):
        again = trainer(tmp_path / "again", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(again) == losses(whole)
        state = again.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_the_loss_is_the_divergence_from_the_float_model_over_the_labels_that_count(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"schedule": {}}, learning_rate=0.0, seed=3, max_steps=1, gradient_accumulation_steps=8)
    run.model.config.attention_dropout = run.model.model.layers[0].self_attn.attention_dropout = 0.0
    float_model = tiny().eval()
    run.train()
    batch = default_data_collator(examples())  # all of them, whatever the order
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        student = ig.convert(run.model)(input_ids=batch["input_ids"]).logits
        expected = ig.Distillation()(student, float_model(input_ids=batch["input_ids"]).logits, targets)
    # Sums of 8 batches against one sum, in float32.
    assert losses(run)[0] == pytest.approx(float(expected), rel=1e-4)


def test_evaluation_runs_the_deployed_model_and_early_stopping_decides_by_it(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, {"schedule": {"float_steps": 5}}, [EarlyStoppingCallback(1, 1e9)], eval_strategy="steps",
        eval_steps=2, metric_for_best_model="eval_loss", load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 4  # nothing is better by 1e9: it stopped at the second evaluation
    batches = [default_data_collator(examples(6, seed=1)[start : start + 4]) for start in (0, 4)]
    metrics = run.evaluate()
    integer = ig.convert(run.model)
    with torch.no_grad():
        found = [integer(**batch).loss * len(batch["labels"]) for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(float(sum(found) / 6), rel=1e-6)
    assert not torch.equal(run.model.eval()(**batches[0]).logits, tiny().eval()(**batches[0]).logits)
    teacher = ig.teacher(run.model)
    assert not torch.equal(teacher(input_ids=batches[0]["input_ids"]).logits, run.model(**batches[0]).logits)


def test_a_run_on_labels_has_the_model_s_own_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"distillation": None, "schedule": {}}, learning_rate=0.0, max_steps=1)
    run.model.train()
    batch = default_data_collator(examples(4))
    run.model.model.layers[0].self_attn.attention_dropout = 0.0
    outputs = run.model(**batch)
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs, targets))


def test_scales_have_groups_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"scale_lr": 1e-4})
    run.create_optimizer()
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    assert groups["weights"]["weight_decay"] == 0.1 and groups["weights"]["lr"] == 1e-2
    scales = [group for name, group in groups.items() if "quantizer" in name]
    assert scales and all(group["weight_decay"] == 0.0 and group["lr"] < 1e-4 for group in scales)


def test_what_is_trained_is_what_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run = trainer(tmp_path, {"target": "vllm", "rules": [GROUPS_OF_32]})
    run.train()
    batch = {"input_ids": default_data_collator(examples(4))["input_ids"]}
    loaded = ig.export(run.model, tmp_path / "vllm")
    assert ig.verify(run.model, loaded, [batch])
    assert torch.equal(copy.deepcopy(run.model).eval()(**batch).logits, ig.convert(run.model)(**batch).logits)


def test_a_teacher_of_another_vocabulary_and_what_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    other = tiny()
    other.resize_token_embeddings(310)
    with pytest.raises(DistillationError, match="teacher has 310 classes and the student 300: another vocabulary"):
        trainer(tmp_path, {"distils_from": ig.teacher(other)}).train()
    with pytest.raises(PlanError, match="Give batches to calibrate"):
        QAT(tiny())


def test_the_example_runs_on_a_tiny_model_and_resumes(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog.\n" * 60
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(text)
    tokenizer = byte_level_tokenizer((text,), 300)
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = (ROOT / "examples" / "causal_language_modelling.py").read_text()
    assert source.count("# +\n") == 4
    main = runpy.run_path(str(ROOT / "examples" / "causal_language_modelling.py"))["main"]
    main.__globals__["QAT"] = lambda *args, **kwargs: QAT(*args, rules=[GROUPS_OF_32], **kwargs)
    options = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(tmp_path / "train.txt")]
    options += ["--validation_file", str(tmp_path / "test.txt"), "--block_size", "16", "--output_dir"]
    rest = ["--do_train", "--do_eval", "--max_steps", "4", "--save_steps", "2", "--use_cpu", "--report_to", "none"]
    assert main([*options, str(tmp_path / "one"), *rest]) == 0
    found = json.loads((tmp_path / "one" / "eval_results.json").read_text())
    assert math.isfinite(found["perplexity"])
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    assert main([*options, str(tmp_path / "two"), *rest, "--resume_from_checkpoint", checkpoint]) == 0
    again = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert again["eval_loss"] == found["eval_loss"]
    folder = tmp_path / "one"
    saved = ig.restore(transformers.AutoModelForCausalLM.from_pretrained(folder), folder)
    assert saved.isogrid_step == 4
    batch = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    assert ig.verify(saved, ig.export(saved, tmp_path / "vllm"), [batch])
