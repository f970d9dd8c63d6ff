"""Lightning and TRL train by the callbacks, resume bit for bit and evaluate what is deployed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import isogrid as ig
from isogrid.errors import DistillationError
from tests.integrations.test_transformers import losses, tiny

pytestmark = pytest.mark.runtime("loops")


def lightning_module() -> Any:
    import lightning.pytorch as lightning

    class Small(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
            x = data().tensors[0]
            ig.prepare(self.net, ig.plan(self.net, scheme="w4a8", example_inputs=(x,)))
            ig.calibrate(self.net, [x])
            self.teacher, self.distillation = ig.teacher(self.net), ig.Distillation()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            said = self.teacher(batch[0])
            loss = self.distillation(self.net(batch[0]), said)
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("deployed", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(ig.parameter_groups(self.net, lr=1e-2))

    return Small()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator))


def fitted(folder: Path, checkpoint: str | None = None, epochs: int = 3, **options: Any) -> Any:
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from isogrid.integrations.lightning import QATCallback

    module = lightning_module()
    qat = QATCallback("net", weight_only_steps=2, ramp_steps=2)
    saving = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}", monitor="deployed")
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, accumulate_grad_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[qat, saving], **options,
    )  # fmt: skip
    loaders = DataLoader(data(), batch_size=8, shuffle=True), DataLoader(data(), batch_size=32)
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return module, trainer, qat


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=["float32", "bfloat16"])
def test_lightning_resumes_bit_for_bit_and_validates_what_is_deployed(tmp_path: Path, options: dict[str, Any]) -> None:
    module, trainer, qat = fitted(tmp_path, **options)
    assert qat.schedule.position == trainer.global_step == 6 and len(module.losses) == 12
    x, targets = data().tensors
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(options)):
        expected = nn.functional.cross_entropy(ig.convert(module.net)(x), targets)
    assert torch.equal(trainer.callback_metrics["deployed"], expected.float())
    # The order of the data and what drops out are those that the whole run had after these epochs.
    for epoch in (0, 1):
        torch.manual_seed(epoch)
        again, _, qat = fitted(tmp_path / "again", str(tmp_path / f"epoch={epoch}.ckpt"), **options)
        assert qat.schedule.position == 6 and again.losses == module.losses[4 * (epoch + 1) :]
        state = again.net.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in module.net.state_dict().items())


def test_trl_s_sft_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from isogrid.integrations.transformers import QAT
    from isogrid.recipes.tokens import byte_level_tokenizer

    text = "The quick brown fox jumps over the lazy dog."
    tokenizer = byte_level_tokenizer((text,), 300)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_list([{"text": f"{text} {number}"} for number in range(16)])

    def run(folder: Path, checkpoint: str | None = None, loss: Any = lambda qat: qat.loss) -> SFTTrainer:
        model = tiny()
        args = SFTConfig(
            output_dir=str(folder), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, report_to="none", use_cpu=True, learning_rate=1e-2, bf16=False,
            eval_strategy="steps", eval_steps=4, loss_type="nll", gradient_checkpointing=True,
        )  # fmt: skip
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        qat = QAT(model, [{"input_ids": ids}], scheme="w4a16")
        trainer = SFTTrainer(
            model, args, train_dataset=rows, eval_dataset=rows.select(range(2)), processing_class=tokenizer,
            callbacks=[qat], optimizer_cls_and_kwargs=qat.optimizer(args), compute_loss_func=loss(qat),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(tmp_path / "whole")
    assert len(losses(whole)) == 4 and all(loss > 0 for loss in losses(whole))
    batch = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
    with torch.no_grad():
        assert torch.equal(whole.model.eval()(**batch).logits, whole.model.isogrid_deployed.twin()(**batch).logits)
    with pytest.raises(DistillationError, match=r"compute_loss_func=qat\.loss"):
        run(tmp_path / "fused", loss=lambda qat: None)
    again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.model.state_dict().items())
