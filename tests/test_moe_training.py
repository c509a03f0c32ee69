"""Models with experts in training: counts and balance over steps and ranks, losses, logs, checkpoints, compilers."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer

sys.path.insert(0, str(Path(__file__).parent))

from moe_cases import batch, config

from seqlong.backbone import Backbone
from seqlong.batch import SequenceBatch
from seqlong.callbacks import ExpertLoad, FiniteGuard, MetricsCsv, RunFolder
from seqlong.ffn import MoE
from seqlong.ffn.balance import step_of_bias, wanted_shares
from seqlong.mixers import MoH
from seqlong.optim import Schedule
from seqlong.report import write_report
from seqlong.tasks import CausalLM
from seqlong.tasks.experts import ExpertLoads


def test_one_graph_without_a_wait() -> None:
    """In a process of its own: the tests' check of shapes cannot be traced."""
    script = """
import torch
from seqlong.ffn import MoE
from seqlong.layout import SequenceLayout
from functools import partial
from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.mixers import Mamba2

class NoWait(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in ("item", "tolist", "nonzero", "__bool__"), function
        return function(*args, **(kwargs or {}))

ids = torch.tensor([[1] * 7 + [2] * 5 + [0] * 2] * 3, dtype=torch.int32)
engines = ({"identity": 2, "z_loss": 0.1, "balance_loss": 0.1}, {"implementation": "grouped_mm"}, {"choice": "expert"})
for settings in engines:
    moe = MoE(16, experts=4, active=2, d_hidden=8, **settings)
    hidden = torch.randn(3, 14, 16, requires_grad=True)
    def call(hidden, ids):
        output, aux = moe(hidden, SequenceLayout.build(3, 14, ids))
        return output.square().sum() + aux.get("router_loss_sum", 0), aux["load"]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (a, one), (b, two) = compiled(hidden, ids), call(hidden, ids)
    torch.testing.assert_close(a, b)
    assert torch.equal(one, two)
    for x, y in zip(*[torch.autograd.grad(z, [hidden, *moe.parameters()]) for z in (a, b)]):
        torch.testing.assert_close(x, y)
    with NoWait():
        call(hidden, ids)
torch._dynamo.reset()
config = BackboneConfig(d_model=16, pattern="m", layers=2, checkpointing="block",
                        mixers={"m": partial(Mamba2, d_state=8, head_dim=8)},
                        ffn=partial(MoE, experts=4, active=2, d_hidden=8))
model = Backbone(config)
given = SequenceBatch(tokens=torch.randint(0, 16, (2, 12)))
wanted = model(given)
for block in model.blocks:
    block.compile(backend="aot_eager", fullgraph=True)
found = model(given)
torch.testing.assert_close(found.hidden, wanted.hidden)
assert all(torch.equal(found.aux[name], wanted.aux[name]) for name in wanted.aux)
found.hidden.sum().backward()
print("one graph")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert "one graph" in done.stdout, done.stderr[-3000:]


def test_a_bias_sees_the_whole_step_and_a_skipped_step_leaves_no_trace() -> None:
    model, loads = Backbone(config()), ExpertLoads()
    sums = {}
    for _ in range(3):
        aux = model(batch()).aux
        loads.add(aux)
        for number in (1, 2):
            sums[number] = sums.get(number, 0) + aux[f"experts/{number}/load"]
    before = [block.ffn.router.bias.clone() for block in model.blocks]  # type: ignore[union-attr]
    loads.end_step(model)
    for number, block in enumerate(model.blocks, 1):
        step = block.ffn.router.bias - before[number - 1]  # type: ignore[union-attr]
        torch.testing.assert_close(step, step_of_bias(sums[number], wanted_shares(4, 0, None), 1e-3))
        assert step.any()
    assert loads.loads() == {(number, "ffn"): load.tolist() for number, load in sums.items()}
    kept = [block.ffn.router.bias.clone() for block in model.blocks]  # type: ignore[union-attr]
    loads.add(model(batch()).aux)
    loads.end_step(model, taken=False)
    assert all(torch.equal(a, b.ffn.router.bias) for a, b in zip(kept, model.blocks, strict=True))  # type: ignore[union-attr]
    figures = loads.figures(model)
    assert abs(figures["experts/1/max_violation"] - (max(sums[1]) * 4 / sums[1].sum() - 1)) < 1e-6
    assert 0 < figures["experts/1/entropy"] <= 1 and figures["experts/1/dead"] == 0
    loads.end_step(model)
    assert loads.loads() == {}, "another row begins"


def test_losses_of_the_router_are_means_over_positions_that_are_not_padding() -> None:
    task = CausalLM(config(ffn=partial(MoE, experts=4, active=2, d_hidden=8, z_loss=0.5)))
    given = batch(padded=True)
    loss, figures = task.objective(given)
    output = task.backbone(given)
    wanted = output.aux["router_loss_sum"] / 41
    torch.testing.assert_close(figures["aux_router_loss"], wanted.detach())
    nll = task.head.loss(output.hidden, given.targets)
    torch.testing.assert_close(loss, nll.sum() / (given.targets >= 0).sum() + wanted)  # type: ignore[operator]
    assert not any(name.startswith("aux_experts") for name in figures)


def _share_of_the_rows(rank: int, ranks: int, folder: str) -> None:
    """One rank of a run: gradients averaged over ranks, and the biases after three steps of two batches each."""
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    task = CausalLM(config(ffn=partial(MoE, experts=4, active=2, d_hidden=8, z_loss=0.5, balance_loss=0.5))).double()
    drawn = [batch(padded=True) for _ in range(6)]
    for number, given in enumerate(drawn):
        part = SequenceBatch(
            tokens=given.tokens[rank::ranks], targets=given.targets[rank::ranks],  # type: ignore[index]
            segment_ids=given.segment_ids[rank::ranks],  # type: ignore[index]
        )  # fmt: skip
        loss, _ = task.objective(part)
        if number < 5:
            loss.detach_()
        if number % 2:
            task.experts.end_step(task.backbone)
    loss.backward()
    result = [block.ffn.router.bias for block in task.backbone.blocks]  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    for gradient in gradients if ranks > 1 else ():
        torch.distributed.all_reduce(gradient)
        gradient /= ranks
    torch.save([result, gradients, task.experts.loads()], f"{folder}/{ranks}-{rank}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def test_two_ranks_count_and_learn_as_one_does(tmp_path: Path) -> None:
    _share_of_the_rows(0, 1, str(tmp_path))
    command = [sys.executable, __file__]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone[2] == first[2] == second[2]
    for one, two, three in zip(alone[0], first[0], second[0], strict=True):
        assert torch.equal(one, two) and torch.equal(two, three) and one.any()
    for one, two in zip(alone[1], first[1], strict=True):
        torch.testing.assert_close(one, two)


class Rows(LightningDataModule):
    """The same few rows, over and over."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(4, 8, (64, 2, 21), generator=generator)
        rows = [SequenceBatch(tokens=part[:, :-1], targets=part[:, 1:]) for part in tokens]
        return torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def fit(folder: Path, steps: int, accumulate: int = 1, checkpoint: Path | None = None) -> tuple[CausalLM, Trainer]:
    torch.manual_seed(0)
    ffn = partial(MoE, experts=4, active=2, d_hidden=8, identity=1, z_loss=1e-2, bias_rate=0.01)
    heads = partial(MoH, heads=4, shared=1, active=2)
    backbone = config(ffn=ffn, pattern="mh", mixers={**config().mixers, "h": heads})
    task = CausalLM(backbone, schedule=Schedule(kind="constant"))
    trainer = Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, default_root_dir=folder, log_every_n_steps=4,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        logger=MetricsCsv(folder / "metrics.csv"), callbacks=[RunFolder(), FiniteGuard(), ExpertLoad()],
    )  # fmt: skip
    trainer.fit(task, Rows(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return task, trainer


@pytest.mark.filterwarnings("ignore")
def test_a_run_balances_logs_checkpoints_and_reports_its_experts(tmp_path: Path) -> None:
    task, trainer = fit(tmp_path / "run", 9)
    trainer.save_checkpoint(tmp_path / "nine.ckpt")
    biases = [block.ffn.router.bias for block in task.backbone.blocks]  # type: ignore[union-attr]
    assert all(0.01 < bias.abs().max() < 0.1 for bias in biases)
    saved = torch.load(tmp_path / "nine.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["backbone.blocks.0.ffn.router.bias"], biases[0])
    assert int(saved["seqlong_expert_loads"]["experts/1/load"].sum()) == 2 * 20 * 2, "one step since the last row"
    onward, _ = fit(tmp_path / "onward", 12, checkpoint=tmp_path / "nine.ckpt")
    lines = (tmp_path / "run" / "experts.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == [
        "step,block,part", *[f"{step},{part}" for step in (4, 8) for part in ("1,ffn", "2,mixer", "2,ffn")]
    ]  # fmt: skip
    for line, of in zip(lines[1:4], (5, 3, 5), strict=True):  # 4 and 1 idle; heads that are not shared
        counts = list(map(int, line.rsplit(",", 1)[1].split()))
        assert len(counts) == of and sum(counts) == 4 * 2 * 20 * 2, "four steps of two rows of 20, two each"
    again = (tmp_path / "onward" / "experts.csv").read_text().splitlines()
    assert sum(map(int, again[1].rsplit(",", 1)[1].split())) == 4 * 2 * 20 * 2, "a row that two sittings share is whole"
    metrics = (tmp_path / "run" / "metrics.csv").read_text()
    for name in ("max_violation", "dead", "entropy", "identity"):
        assert metrics.count(f"experts/2/{name}") == 2
    assert [metrics.count(f"routers/2/{name}") for name in ("max_violation", "dead", "entropy")] == [2, 2, 2]
    assert "routers/1" not in metrics and "routers/2/identity" not in metrics
    assert metrics.count("train/router_loss") == 2
    page = write_report(tmp_path / "run").read_text()
    assert page.count('aria-label="load of 5 experts"') == 2 and page.count("times the mean</title>") == 13
    assert page.count('aria-label="load of 3 experts"') == 1 and "2 h mixer" in page and "2 h ffn" in page
    assert "entropy 0." in page and "entropy nan" not in page
    assert all(f"Largest MaxVio of any {part}" in page for part in ("mixer", "feed-forward"))
    described = task.describe()
    inner = 2 * (4 - 2) * 3 * 16 * 8  # two blocks, two of four experts, three matrices
    assert described["parameters"] - described["parameters_active"] == inner
    assert [block["ffn"] for block in described["blocks"]] == ["MoE", "MoE"]
    assert onward is not task


if __name__ == "__main__":
    _share_of_the_rows(int(sys.argv[1]), 2, sys.argv[2])
