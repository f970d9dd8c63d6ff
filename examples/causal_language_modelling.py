r"""Fine-tuning of a causal language model with transformers' Trainer, in the steps of its example `run_clm.py`.

The four lines marked with `+` make it quantization-aware: 4-bit weights for vLLM, the float model as teacher, and
evaluation of what will be deployed.

    python examples/causal_language_modelling.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --train_file train.txt --validation_file test.txt --output_dir runs/clm --do_train --do_eval
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from isogrid.integrations.transformers import QAT  # +


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "Name or folder of a causal language model."})


@dataclass
class DataTrainingArguments:
    """Which text."""

    train_file: str = field(metadata={"help": "A text file to train on."})
    validation_file: str = field(metadata={"help": "A text file to evaluate on."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a sequence."})


def group_texts(path: str, tokenizer: Any, block_size: int) -> list[dict[str, list[int]]]:
    """All lines of a file, one after the other, cut into blocks; what does not fill one is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    ids = list(chain.from_iterable(tokenizer(lines)["input_ids"]))
    blocks = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
    return [{"input_ids": block, "attention_mask": [1] * block_size, "labels": list(block)} for block in blocks]


def main(arguments: list[str]) -> int:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    train_dataset = group_texts(data_args.train_file, tokenizer, data_args.block_size)
    eval_dataset = group_texts(data_args.validation_file, tokenizer, data_args.block_size)

    qat = QAT(model, [default_data_collator(train_dataset[:8])], scheme="w4a16", target="vllm")  # +
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[qat],  # +
        optimizer_cls_and_kwargs=qat.optimizer(training_args),  # +
    )
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
