"""Evaluates a checkpoint inside a ZeRO-3 engine and compares with the predictions of one process.

Arguments: checkpoint, shards, predictions.jsonl to equal, batch size. Ends with "all equal".
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import deepspeed

from coconut.data import ImageProcessor, MultimodalCollator, SampleEncoder, open_dataset
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.result import EvaluationOptions
from coconut.model import MultimodalCoconut
from coconut.utils.distributed import get_rank, init_distributed_training, shutdown_distributed
from coconut.utils.tokenizer import load_tokenizer
from tests.distributed.parity_worker import REALLY_PARTITIONED


def main(checkpoint: Path, shards: Path, expected: Path, batch_size: int) -> None:
    init_distributed_training()
    model = MultimodalCoconut.from_pretrained(checkpoint)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, **REALLY_PARTITIONED},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=list(model.parameters()))
    model.lockstep = True
    tokenizer, processor = load_tokenizer(str(checkpoint)), ImageProcessor.from_pretrained(checkpoint)
    assert model.prompt_template is not None
    assert model.stage_spec is not None
    result = evaluate(
        engine.module,
        open_dataset(shards),
        encoder=SampleEncoder(tokenizer, processor, model.prompt_template, model.tokens_per_patch),
        collator=MultimodalCollator(tokenizer, processor, model.latent_token_id),
        tokenizer=tokenizer,
        spec=model.stage_spec,
        options=EvaluationOptions(batch_size=batch_size, max_new_tokens=6, thoughts="noise"),
    )
    released = sum(parameter.numel() == 0 for parameter in model.parameters())
    assert released > 0, "no parameter was ever released: this run tested nothing"
    theirs = [json.loads(line) for line in expected.read_text().splitlines()]
    assert [asdict(prediction) for prediction in result.predictions] == theirs
    if get_rank() == 0:
        print(f"all equal: {result.n_samples} samples, {released} parameters released")
    shutdown_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
