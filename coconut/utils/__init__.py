"""What every layer above needs and none of them owns: process groups, logging, seeds, the tokenizer."""

from coconut.utils.distributed import (
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    get_device,
    get_local_rank,
    get_rank,
    get_world_size,
    init_distributed_training,
    is_main_process,
    shutdown_distributed,
)
from coconut.utils.logging import get_logger, log_to_wandb, setup_logging
from coconut.utils.seed import set_seed
from coconut.utils.tokenizer import load_tokenizer, special_token_ids

__all__ = [
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "get_device",
    "get_local_rank",
    "get_logger",
    "get_rank",
    "get_world_size",
    "init_distributed_training",
    "is_main_process",
    "load_tokenizer",
    "log_to_wandb",
    "set_seed",
    "setup_logging",
    "shutdown_distributed",
    "special_token_ids",
]
