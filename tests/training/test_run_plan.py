"""The plan: what it simulates is what a real step allocates, and its accounting follows ranks, stages and settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

from coconut.config import Config, ConfigError
from coconut.model.adapters import LoraSettings, choose_trained
from coconut.model.loading import configure
from coconut.model.presets import PRESETS, preset_config
from coconut.training.plan_data import StageShape, assumed_data_shape
from coconut.training.run_plan import MemoryPlan, PlannedModel, ZeroSettings, count_parameters, plan_work
from coconut.training.simulation import BatchShape, outline_model, simulate, simulate_deep
from tests.model.reference import batch_rows, make_row, tiny_text, wrap

ROWS = BatchShape(rows=3, columns=64, labels=30, latents=3)
LORA = LoraSettings(rank=4, alpha=8.0)


def decoder(**sizes: int) -> Qwen2Config:
    settings = dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=1000, tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen2Config(**(settings | sizes))


def planned(shape: BatchShape = ROWS, *, dtype=torch.float32, checkpointing=False, on_cpu=False, **sizes: int):
    return PlannedModel(outline_model(decoder(**sizes)), shape, dtype=dtype, checkpointing=checkpointing, on_cpu=on_cpu)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("internvl3-1b", 0.94), ("internvl3-8b", 7.94), ("internvl3-38b", 38.4), ("internvl3-78b", 78.4)],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert count_parameters(outline_model(preset_config(name))) / 1e9 == pytest.approx(billions, rel=0.005)


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=f"choose from {', '.join(PRESETS)}"):
        preset_config("internvl3-2b")


def test_nothing_is_left_alive_and_nothing_stays_replaced() -> None:
    attention, truth = torch.nn.functional.scaled_dot_product_attention, torch.Tensor.__bool__
    model = outline_model(decoder())
    live = simulate(model, ROWS)
    assert sum(live.now.values()) == 0
    assert torch.nn.functional.scaled_dot_product_attention is attention and torch.Tensor.__bool__ is truth
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_every_weight_are_counted() -> None:
    """With a tiny batch all there is at the end are gradients; the tied table's come from head and embedding apart."""
    model = outline_model(decoder(num_hidden_layers=4, hidden_size=128, intermediate_size=512))
    live = simulate(model, BatchShape(rows=1, columns=8, labels=2))
    assert 4 * count_parameters(model) < live.peak["gradients"] < 1.3 * 4 * count_parameters(model)


@pytest.mark.parametrize(("latents", "keeps"), [(0, True), (2, True), (2, False)])
def test_few_layers_tell_of_many(latents: int, keeps: bool) -> None:
    model = outline_model(decoder(num_hidden_layers=9))
    shape = BatchShape(2, 96, 20, latents)
    whole = simulate(model, shape, lambda parameter: keeps).peak
    told = simulate_deep(model, shape, lambda parameter: keeps)
    assert len(model.backbone.decoder_layers) == 9
    assert sum(told.values()) == pytest.approx(sum(whole.values()), rel=0.02)


def test_shares_of_all_passes_are_waited_for_though_gradients_go_at_once() -> None:
    """Several passes use each weight: none of the layers' gradients is complete before the first pass's backward."""
    sizes = dict(num_hidden_layers=4, hidden_size=128, intermediate_size=512)
    model = outline_model(decoder(**sizes))
    layers = 4 * sum(parameter.numel() for parameter in model.backbone.decoder_layers.parameters())
    one_pass = simulate(model, BatchShape(1, 32, 2), lambda parameter: False)
    passes = simulate(model, BatchShape(1, 32, 2, latents=2), lambda parameter: False)
    assert one_pass.peak["gradients"] < 0.5 * layers
    assert passes.peak["gradients"] > 0.8 * layers


@pytest.mark.slow
def test_checkpointing_holds_less_and_a_longer_batch_more() -> None:
    wide = dict(num_hidden_layers=6)
    plain, kept = (planned(checkpointing=flag, **wide).memory(1, ZeroSettings()) for flag in (False, True))
    assert kept.parts["activations"] < 0.6 * plain.parts["activations"]
    longer = planned(BatchShape(3, 128, 30, 3), **wide).memory(1, ZeroSettings())
    assert longer.parts["activations"] > 1.5 * plain.parts["activations"]
    assert kept.parts["cache"] > 0


def test_logits_count_at_labels_only() -> None:
    few, many = (
        simulate(outline_model(decoder(vocab_size=50_000)), BatchShape(1, 200, labels, 0)) for labels in (2, 150)
    )
    grown = sum(many.peak.values()) - sum(few.peak.values())
    assert grown > 148 * 50_000 * 4


def total(stage: int, ranks: int, **options) -> MemoryPlan:
    return planned(BatchShape(1, 16, 2), dtype=torch.bfloat16, hidden_size=256, intermediate_size=1024).memory(
        ranks, ZeroSettings(stage=stage, reduce_bucket=1000, max_live=1000, persistent=0, **options)
    )


def test_each_zero_stage_divides_what_it_divides() -> None:
    n = count_parameters(outline_model(decoder(hidden_size=256, intermediate_size=1024)))
    parts = {stage: total(stage, 4).parts for stage in (0, 1, 2, 3)}
    assert parts[0]["weights"] == parts[1]["weights"] == parts[2]["weights"] == 2 * n
    assert parts[3]["weights"] == pytest.approx(2 * n / 4, rel=0.01)
    assert parts[0]["optimizer"] >= 12 * n  # float32 weights and two moments
    assert parts[1]["optimizer"] < 0.5 * parts[0]["optimizer"]
    assert total(3, 8).total < total(3, 4).total < total(2, 4).total <= total(1, 4).total < total(0, 4).total


def test_offloaded_state_is_on_the_host() -> None:
    here, there = total(3, 4), total(3, 4, offload_optimizer=True, offload_param=True)
    assert here.host == 0
    assert there.parts.get("optimizer", 0) == 0
    assert there.host > 14 * count_parameters(outline_model(decoder(hidden_size=256, intermediate_size=1024))) / 4
    assert there.total < here.total


def test_zero_3_holds_the_text_model_whole_where_the_limit_allows_it() -> None:
    model = planned(BatchShape(1, 16, 2), dtype=torch.bfloat16)
    small = model.memory(4, ZeroSettings(stage=3, max_live=10, persistent=0))
    large = model.memory(4, ZeroSettings(stage=3, max_live=10**9, persistent=0))
    assert not small.is_gathered_whole and large.is_gathered_whole
    assert large.total > small.total


@pytest.mark.parametrize(("latents", "is_whole"), [(0, False), (2, True)])
def test_the_backward_of_several_passes_holds_the_decoder_whole_also_where_layers_are_gathered_one_by_one(
    latents: int, is_whole: bool
) -> None:
    """As measured (benchmarks/memory_plan.py, zero3-layers and zero3-cot)."""
    zero = ZeroSettings(stage=3, max_live=10, persistent=0)
    plan = planned(BatchShape(1, 16, 2, latents), hidden_size=256, intermediate_size=1024).memory(4, zero)
    n = count_parameters(outline_model(decoder(hidden_size=256, intermediate_size=1024)))
    assert not plan.is_gathered_whole
    assert (plan.parts["gathered weights"] > 0.8 * 4 * n) is is_whole


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("freeze", "lora"), [(["language"], None), ([], LORA)])
def test_only_what_is_trained_has_gradients_and_optimizer_state(
    stage: int, freeze: list[str], lora: LoraSettings | None
) -> None:
    sizes = dict(num_hidden_layers=2, hidden_size=256, intermediate_size=1024)
    zero = ZeroSettings(stage=stage, reduce_bucket=1000, max_live=1000, persistent=0)
    whole, part = (
        PlannedModel(model, BatchShape(1, 8, 2), dtype=torch.bfloat16, checkpointing=False)
        for model in (outline_model(decoder(**sizes)), outline_model(decoder(**sizes), freeze, lora))
    )
    n, trained = count_parameters(part.model), count_parameters(part.model, trained=True)
    assert trained < 0.2 * n
    everything, plan = whole.memory(4, zero), part.memory(4, zero)
    weights = -(-n // 4) if stage == 3 else n
    assert plan.parts["weights"] == 2 * weights
    share = -(-trained // 4) if stage else trained
    assert plan.parts["optimizer"] in (12 * share, 16 * share)  # the latter in the step
    assert plan.parts["gradients"] < 0.5 * everything.parts["gradients"]
    host = part.memory(4, replace(zero, offload_optimizer=True, offload_param=stage == 3)).host
    assert host == 16 * share + 2 * weights * (stage == 3)


@pytest.mark.parametrize("freeze", [[], ["language"], ["embeddings"]])
@pytest.mark.parametrize("lora", [None, LORA])
def test_the_plan_trains_what_training_trains(freeze: list[str], lora: LoraSettings | None) -> None:
    model = wrap(tiny_text("qwen2"))
    choose_trained(model, freeze, lora, seed=0)
    outline = outline_model(model.base_model.config, freeze, lora)
    assert count_parameters(outline) == count_parameters(model)
    assert count_parameters(outline, trained=True) == count_parameters(model, trained=True)
    assert all(parameter.is_meta for parameter in outline.parameters())


def test_memory_is_that_of_the_stage_that_needs_most() -> None:
    """Also where that is the first one, which has no thoughts: here its batch is larger."""
    first, middle, last = BatchShape(8, 64, 80), BatchShape(1, 64, 10, 1), BatchShape(1, 66, 10, 2)
    settings = dict(dtype=torch.float32, checkpointing=False)
    all_of_them = PlannedModel(outline_model(decoder()), last, middle, first, **settings)
    assert set(all_of_them.shapes) == {first, last}  # the middle one is not worth the time
    plans = [PlannedModel(outline_model(decoder()), s, **settings).memory(1, ZeroSettings()) for s in (first, last)]
    assert plans[0].total > plans[1].total
    found = all_of_them.memory(1, ZeroSettings())
    assert found.total == plans[0].total and found.batch == first


def test_pauses_in_one_pass_need_less_than_passes() -> None:
    zero = ZeroSettings(stage=3, max_live=1000, persistent=0, reduce_bucket=1000)
    shape, methods = BatchShape(1, 64, 10, 4), ("coconut", "pause_multipass", "pause_as_thought", "pause")
    totals = []
    for method in methods:
        model = outline_model(decoder(num_hidden_layers=2, hidden_size=256))
        configure(model, Config({"method": method}))
        plan = PlannedModel(model, shape, dtype=torch.float32, checkpointing=False).memory(2, zero)
        assert plan.has_passes == (method in methods[:2])
        totals.append(plan.total)
    assert totals[0] == pytest.approx(totals[1], rel=0.01)
    assert totals[2] == totals[3] < 0.95 * totals[0]


def test_stages_have_their_own_batches_and_thoughts() -> None:
    own = {0: {"batch_size_training": 8}, 1: {"gradient_accumulation_steps": 4}}
    settings = {"batch_size_training": 2, "max_latent_stage": 2, "c_thought": 2, "num_epochs": None, "stages": own}
    config = Config({**settings, "uniform_prob": 0.0})
    data = assumed_data_shape(config, 3, columns=50, labels=10, tiles=1)
    seen = [(s.stage, s.largest.rows, s.largest.latents, s.step_samples) for s in data.stages]
    assert seen == [(0, 8, 0, 24), (1, 2, 2, 24), (2, 2, 4, 6)]
    assert data.stages[0].largest == BatchShape(8, 50, 80, 0, 8)
    assert [[s.stage for s in group] for group in data.alike()] == [[0, 1], [2]]
    mixed = assumed_data_shape(Config({**settings, "uniform_prob": 0.1}), 3, columns=50, labels=10, tiles=1)
    assert [s.largest.latents for s in mixed.stages] == [4, 4, 4]  # a sample of any stage may come


def test_a_step_s_work_is_that_of_its_tokens() -> None:
    data = StageShape(0, 8, BatchShape(1, 20, 4, 2), tokens=18.0, tiles=0.0, labels=4.0)
    one, two = (plan_work(decoder(), replace(data, step_samples=n), checkpointing=False) for n in (8, 16))
    assert one.tokens == 160 and two.tokens == 320
    assert two.flops == pytest.approx(2 * one.flops)
    assert plan_work(decoder(), data, checkpointing=True).flops == pytest.approx(one.flops * 4 / 3)


@pytest.mark.parametrize("lora", [None, LORA])
def test_simulated_activations_are_those_that_a_real_forward_saves(lora: LoraSettings | None) -> None:
    """Against the tensors that autograd keeps for a real backward of the same model and batch."""
    model = wrap(tiny_text("qwen2"))
    choose_trained(model, [], lora, seed=0)
    generator = torch.Generator().manual_seed(0)
    batch = batch_rows([make_row(generator, 0, words=20, target=6) for _ in range(2)])
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch, loss_only=True).loss  # noqa: B018
    real = sum(n_bytes for address, n_bytes in saved.items() if address not in weights)
    outline = outline_model(model.base_model.config, [], lora)
    rows, columns = batch["input_ids"].shape
    labels = int((batch["labels"][:, 1:] != -100).sum())
    live = simulate(outline, BatchShape(rows, columns, labels), lambda parameter: False)
    kept = sum(live.peak.values())
    assert real <= kept < 1.6 * real
