"""Lightning: fit in two processes with bfloat16, checkpoint, and go on from it.

python examples/lightning_fit.py
"""

import tempfile
from pathlib import Path

import digits
import lightning
import torch
from torch.utils.data import DataLoader

import gpdfx


class Distill(lightning.LightningModule):
    """Student and dynamic teacher; one loss."""

    def __init__(self, gpd: gpdfx.GPD) -> None:
        super().__init__()
        self.gpd = gpd

    def training_step(self, batch, _):
        out = self.gpd(*batch)
        self.log_dict({"loss": out.loss} | out.terms)
        return out.loss

    def validation_step(self, batch, _):
        out = self.gpd(*batch)
        right = (out.student_logits.argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(gpdfx.param_groups(self.gpd, 0.01), lr=0.01)


def fit(folder: str, epochs: int, checkpoint: str | None = None) -> Distill:
    """Train up to so many epochs, from a checkpoint if there is one."""
    train, x, y = digits.load()
    test = torch.utils.data.TensorDataset(x, y)
    module = Distill(gpdfx.GPD(digits.cnn(), ratio=2, example_inputs=(x[:2],)))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(train, 25, shuffle=True), DataLoader(test, 99)
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return module


def main() -> None:
    lightning.seed_everything(0)
    _, x, y = digits.load()
    with tempfile.TemporaryDirectory() as folder:
        fit(folder, 2)
        (first,) = Path(folder).rglob("*.ckpt")
        gpd = fit(folder, 6, str(first)).gpd
        (last,) = {*Path(folder).rglob("*.ckpt")} - {first}
        steps = [torch.load(file, weights_only=False)["global_step"] for file in (first, last)]
    assert steps == [2 * 15, 6 * 15]  # 30 batches an epoch in each process, two a step
    with torch.no_grad():
        student = gpd.eval().student(x)
    digits.check("student", gpd.collapse(), student, x, y)


if __name__ == "__main__":
    main()
