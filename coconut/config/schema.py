"""Every configuration key: its type, range, default, unit and meaning. Documentation is made from this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, with_config
from typing_extensions import TypedDict

from coconut.config.data_paths import check_data_path

METHODS = ("coconut", "cot", "no_cot")

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take `true` for 1
        raise ValueError("must be a number")
    return value


def _not_python_none(value: Any) -> Any:
    if isinstance(value, str) and value.strip() in ("", "None"):
        raise ValueError("must be text; write null for none")
    return value


@dataclass(frozen=True)
class Unit:
    """What a number counts or measures; documentation shows it."""

    name: str


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Text = Annotated[str, BeforeValidator(_not_python_none)]
DataPath = Annotated[str | dict[str, float], BeforeValidator(check_data_path)]

# Numbers with a unit; those without one are `Int` and `Float`.
Steps = Annotated[Int, Unit("optimizer steps")]
Thoughts = Annotated[Int, Unit("thoughts")]
MicroBatches = Annotated[Int, Unit("micro-batches")]
Validations = Annotated[Int, Unit("validations")]
Epochs = Annotated[Int, Unit("epochs")]
Samples = Annotated[Int, Unit("samples")]
Tokens = Annotated[Int, Unit("tokens")]
Pixels = Annotated[Int, Unit("pixels")]
Seconds = Annotated[Float, Unit("seconds")]
Fraction = Annotated[Float, Unit("fraction")]
Probability = Annotated[Float, Unit("probability")]
StageNumber = Annotated[Int, Unit("stage")]


@with_config(_STRICT)
class StageSettings(TypedDict, total=False):
    """What one stage does differently; a key that is left out follows the run's key of the same meaning."""

    learning_rate: Annotated[Float, Field(gt=0, le=1, description="peak learning rate of this stage")]
    epochs: Annotated[Epochs, Field(ge=1, description="epochs of this stage, at most")]
    uniform_prob: Annotated[Probability, Field(ge=0, le=1, description="stage mixing in this stage")]
    warmup_steps: Annotated[Steps, Field(ge=0, description="warm-up of this stage, in optimizer steps")]
    advance_at: Annotated[Fraction | None, Field(gt=0, le=1, description="matching fraction that ends this stage")]
    train_data_path: Annotated[DataPath, Field(description="training data of this stage: a path, or path: weight")]
    steps: Annotated[Steps | None, Field(ge=1, description="optimizer steps of this stage, in the place of epochs")]
    patience: Annotated[
        Validations | None,
        Field(ge=1, description="validations without a gain that end this stage"),
    ]
    min_steps: Annotated[Steps, Field(ge=0, description="optimizer steps of this stage before patience may end it")]
    c_thought: Annotated[Thoughts, Field(ge=1, le=64, description="latent thoughts a written step in this stage")]
    batch_size_training: Annotated[Samples, Field(ge=1, description="samples in a micro-batch of this stage")]
    gradient_accumulation_steps: Annotated[
        MicroBatches, Field(ge=1, description="micro-batches of a rank in a step here")
    ]
    global_batch_size: Annotated[Samples | None, Field(ge=1, description="samples in an optimizer step of this stage")]


class Schema(BaseModel):
    """All keys, in the order in which documentation and saved files list them."""

    model_config = _STRICT

    # -- run --
    seed: Int = Field(42, ge=0, lt=2**63, description="seed of initial weights, data order and stage mixing")
    project: Text = Field("multimodal-coconut", description="wandb project, where wandb_project is not set")
    name: Text = Field("multimodal_coconut", description="name of the run; its folder is save_path/name")
    save_path: Text = Field("runs", description="folder that holds the run folders")
    debug: bool = Field(
        False, description="small run for debugging: log_level DEBUG, 32 training and 16 validation samples, unless set"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level that is logged")
    log_every_n_steps: Steps = Field(10, ge=1, description="optimizer steps between two rows of training metrics")
    use_wandb: bool = Field(
        False,
        description="also send metrics to wandb; a resumed run goes on in the same one (WANDB_MODE=offline works)",
    )
    tensorboard: bool = Field(
        False,
        description="also write metrics to RUN/tensorboard, through DeepSpeed's monitor (pip install tensorboard)",
    )
    live_view: Literal["auto", "always", "never"] = Field(
        "auto",
        description="the run's state at the foot of the terminal, above it the log; auto: where standard output is one",
    )
    wandb_project: Text | None = Field(None, description="wandb project; null = project")

    # -- model --
    model_id: Text = Field(
        "OpenGVLab/InternVL3-1B-Pretrained", description="model to start from: a hub id or a local folder"
    )
    load_model_path: Text | None = Field(
        None, description="checkpoint folder to start from in place of model_id (stage_K/ or final/ of another run)"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention kernel; flash_attention_2 needs a GPU and bf16 or fp16"
    )
    latent_init_token: Text | None = Field(
        None, description="token whose embedding the three new tokens start from; null = the line break"
    )
    latent_feedback: Literal["hidden", "normed", "projector"] = Field(
        "hidden",
        description="what is fed back as a thought: the hidden state (the paper), the same at the norm of an "
        "embedding, or that plus a small trained network of it",
    )
    latent_passes: Literal["sequential", "jacobi"] = Field(
        "sequential",
        description="sequential: thoughts one after the other (the paper); jacobi: all of a span together, "
        "jacobi_iterations times",
    )
    jacobi_iterations: Annotated[Int, Unit("passes")] = Field(
        3, ge=1, le=1000, description="passes over the thoughts with latent_passes jacobi"
    )
    auxiliary_losses: dict[Text, Float] = Field(
        default_factory=dict,
        description='losses on the thoughts, "package.module:name" -> weight (see coconut/model/auxiliary.py)',
    )
    bf16: bool = Field(False, description="weights and activations in bfloat16, with float32 master weights")
    fp16: bool = Field(False, description="weights and activations in float16, with loss scaling; not with bf16")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward: memory for time")

    # -- what is trained --
    freeze: list[Literal["vision", "projector", "language", "embeddings"]] = Field(
        default_factory=list,
        description="parts that are not trained: vision (the tower), projector (from it to the decoder), language (the "
        "decoder), embeddings (token table and head; the latent tokens' rows learn all the same)",
    )
    lora_rank: Int | None = Field(
        None,
        ge=1,
        description="rank of LoRA adapters beside the decoder's linear layers, which freezes language and embeddings; "
        "null = no LoRA",
    )
    lora_alpha: Float | None = Field(None, gt=0, description="scale of LoRA times its rank; null = 2 x lora_rank")
    lora_dropout: Probability = Field(0.0, ge=0, lt=1, description="probability that LoRA drops a value of its input")
    lora_target_modules: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None,
        description="linear layers of the decoder with LoRA, by name or its end ([q_proj, v_proj]); null = all of them",
    )

    # -- curriculum --
    method: Literal[
        "coconut",
        "cot",
        "no_cot",
        "icot",
        "pause",
        "pause_as_thought",
        "pause_multipass",
        "no_curriculum",
        "no_thought",
    ] = Field(
        "coconut",
        description="coconut: stages of latent thoughts; cot: written steps only; no_cot: the answer at once; icot: "
        "stages that drop the steps' leading tokens; the others are ablations (docs/methods.md)",
    )
    icot_tokens: Tokens = Field(8, ge=1, description="tokens of the written steps that each stage of icot drops")
    icot_smoothing: Float | None = Field(
        4.0, gt=0, description="icot drops o tokens more with probability ~ exp(-icot_smoothing * o); null = never"
    )
    start_stage: StageNumber = Field(
        0, ge=0, description="first stage that is trained; 1 where load_model_path holds a model that writes its steps"
    )
    c_thought: Thoughts = Field(2, ge=1, le=64, description="latent thoughts that replace one written step")
    max_latent_stage: StageNumber = Field(
        4, ge=0, le=1000, description="last stage K; stage k replaces the first k steps"
    )
    epochs_per_stage: Epochs = Field(5, ge=1, description="epochs of a stage, at most")
    steps_per_stage: Steps | None = Field(
        None, ge=1, description="optimizer steps of a stage, at most; null = epochs_per_stage decides"
    )
    num_epochs: Epochs | None = Field(
        40, ge=1, description="epochs of the whole run, at most; the last stage takes what is left; null = no limit"
    )
    uniform_prob: Probability = Field(
        0.1, ge=0, le=1, description="probability that a sample is shown at a random stage"
    )
    pad_latent_to_max: bool = Field(
        False, description="give samples with fewer steps than the stage the full number of thoughts too"
    )
    advance_at: Fraction | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of validation samples whose whole text must match to end a stage; null = never",
    )
    stages: dict[Annotated[int, Field(ge=0)], StageSettings] = Field(
        default_factory=dict,
        description="settings of single stages: learning_rate, warmup_steps, uniform_prob, c_thought, epochs or steps, "
        "advance_at, patience, min_steps, batch_size_training, gradient_accumulation_steps, "
        "global_batch_size, train_data_path",
    )

    # -- optimization --
    learning_rate: Float = Field(1e-5, gt=0, le=1, description="peak learning rate of AdamW")
    weight_decay: Float = Field(0.01, ge=0, le=1, description="decoupled weight decay of AdamW")
    warmup_steps: Steps = Field(
        1000, ge=0, description="linear warm-up, in optimizer steps; once more after each optimizer reset"
    )
    max_grad_norm: Float = Field(1.0, ge=0, description="gradient norm to clip to; 0 = do not clip")
    reset_optimizer: bool = Field(True, description="start each stage with a fresh optimizer")
    batch_size_training: Samples = Field(8, ge=1, description="samples in a micro-batch of one rank")
    gradient_accumulation_steps: MicroBatches = Field(
        1, ge=1, description="micro-batches of one rank in an optimizer step"
    )
    global_batch_size: Samples | None = Field(
        None,
        ge=1,
        description="samples in an optimizer step over all ranks; "
        "null = batch_size_training x gradient_accumulation_steps x ranks",
    )
    samples_per_epoch: Samples | None = Field(
        None, ge=1, description="samples that count as an epoch; null = as many as the training sets hold together"
    )
    balance: Literal["none", "count", "cost"] = Field(
        "count",
        description="micro-batches of one step: count: equal numbers of samples, dealt by cost; none: as they come; "
        "cost: of like length up to a cost budget, batch_size_training samples on average, for steps of four or more "
        "micro-batches a rank (docs/data.md)",
    )
    cost_per_patch: Annotated[Float, Unit("tokens")] = Field(
        0.0, ge=0, description="what a tile costs beside its image tokens, in tokens (launch/calibrate.py measures it)"
    )
    cost_per_latent_pass: Annotated[Float, Unit("tokens")] = Field(
        0.0, ge=0, description="what a latent pass costs for one sample, in tokens (launch/calibrate.py measures it)"
    )
    max_steps: Steps | None = Field(None, ge=1, description="optimizer steps after which the run ends; null = no limit")
    stop_after_stage: StageNumber | None = Field(
        None, ge=0, description="stage after which the run ends, without scoring the test data; null = after the last"
    )

    # -- anomalies --
    loss_spike_sigma: Annotated[Float, Unit("standard deviations")] | None = Field(
        10.0,
        gt=0,
        description="skip a step whose loss is so many standard deviations (and 1 nat) above its stage's last 64; "
        "null = skip only where loss or gradient is not finite",
    )
    max_skipped_steps: Steps = Field(
        3, ge=1, description="skipped steps in a row after which weights and optimizer go back to the last checkpoint"
    )
    max_rollbacks: Annotated[Int, Unit("times")] = Field(
        2, ge=0, description="times that a run goes back before it stops with an error"
    )
    hang_timeout_s: Seconds | None = Field(
        1800.0,
        gt=0,
        description="seconds without progress (a batch, a step, a save) after which a rank says where it hangs and "
        "ends the run; null = wait for ever",
    )

    # -- data --
    train_data_path: DataPath | None = Field(
        None,
        description="training data: JSON, JSONL, a folder of shards, or the URL of one (https://, s3://); several are "
        "mixed by weight: {data/a: 2, data/b: 1}",
    )
    val_data_path: Text | None = Field(None, description="validation data; null = no validation")
    test_data_path: Text | None = Field(None, description="test data, scored once at the end or by only_eval")
    image_root: Text | None = Field(None, description="folder that relative image paths of JSON data start from")
    max_train_samples: Samples | None = Field(
        None, ge=1, description="use only the first so many samples of each training set"
    )
    max_val_samples: Samples | None = Field(None, ge=1, description="use only the first so many validation samples")
    num_workers: Annotated[Int, Unit("processes")] = Field(
        4, ge=0, le=256, description="data loader processes of a rank; 0 = load in the rank"
    )
    shard_cache: Text | None = Field(
        None, description="folder for JSON data made into shards and for shards of URLs; null = save_path/.shards"
    )
    allow_pipe_urls: bool = Field(
        False, description="allow 'pipe:COMMAND {name}' in place of a URL; it runs the command in a shell, per file"
    )
    max_bad_fraction: Fraction = Field(
        0.02,
        ge=0,
        le=1,
        description="share of samples that could not be used (bad_samples.jsonl names them) past which the run stops; "
        "of those seen so far, at least 1000",
    )
    image_size: Pixels = Field(448, ge=28, le=4096, description="side of an image tile, in pixels")
    max_num_patches: Annotated[Int, Unit("tiles")] = Field(
        12, ge=1, le=128, description="tiles an image is cut into, at most (no thumbnail)"
    )
    use_thumbnail: bool = Field(True, description="add the whole image as one more tile where it was cut")
    dynamic_preprocess: bool = Field(True, description="cut images by their aspect ratio; false = one tile each")
    prompt_format: Literal["auto", "plain", "chat"] = Field(
        "auto", description="chat: the tokenizer's chat template; plain: a line break; auto: chat where there is one"
    )
    max_length: Tokens | None = Field(
        None, ge=8, description="longest sample in tokens, images included; a longer one is left out; null = no limit"
    )
    pad_to_multiple_of: Annotated[Int, Unit("columns")] = Field(
        1, ge=1, le=4096, description="pad batches to a multiple of so many columns"
    )

    # -- evaluation --
    only_eval: bool = Field(False, description="do not train: score load_model_path or model_id on test_data_path")
    batch_size_eval: Samples = Field(16, ge=1, description="samples a rank evaluates at once")
    eval_every_n_epochs: Epochs = Field(
        1, ge=1, description="epochs between two validations; a stage's end is always one"
    )
    eval_every_n_steps: Steps | None = Field(
        None, ge=1, description="optimizer steps of a stage between two validations; null = eval_every_n_epochs decides"
    )
    validation_metric: Literal["accuracy", "full_match", "loss"] = Field(
        "accuracy",
        description="what tells the best model of a stage, and a gain: answers right, whole texts right, or least loss",
    )
    max_new_tokens: Tokens = Field(100, ge=1, description="tokens generated for a sample, at most")

    # -- checkpoints --
    resume: Text = Field(
        "auto", description="auto: go on from the run folder's newest checkpoint; none: start anew; or a path"
    )
    save_every_n_epochs: Epochs = Field(
        5, ge=1, description="epochs between two checkpoints; a stage's end is always one"
    )
    save_every_n_steps: Steps | None = Field(
        None, ge=1, description="also save each time so many optimizer steps are done; null = at epochs' ends only"
    )
    async_checkpoints: bool = Field(
        False,
        description="write checkpoints inside a stage while training goes on, from a copy in the host's memory (12 "
        "bytes a trained parameter, divided by the ranks); a stage's end and a stop wait for theirs",
    )
    save_only_improve: bool = Field(
        False, description="inside a stage, save after each validation that got better, in place of save_every_n_epochs"
    )
    max_checkpoints: Annotated[Int, Unit("checkpoints")] = Field(
        5, ge=1, description="checkpoints kept; the oldest goes first"
    )
    early_stopping_patience: Validations | None = Field(
        None, ge=1, description="validations without a gain (a plateau) that end a stage; null = off"
    )
    early_stopping_min_steps: Steps = Field(
        0, ge=0, description="optimizer steps of a stage before early_stopping_patience may end it"
    )
    early_stopping_min_delta: Float = Field(0.0, ge=0, description="least change of validation_metric that is a gain")

    # -- machine --
    deepspeed: Text | None = Field(
        None, description="DeepSpeed JSON file (ds_configs/); null = ZeRO stage 0, everything whole on every rank"
    )
    num_threads: Annotated[Int, Unit("threads")] | None = Field(
        None, ge=1, description="CPU threads of a rank; null = as the launcher set them"
    )
    peak_tflops: Annotated[Float, Unit("TFLOPS")] | None = Field(
        None,
        gt=0,
        description="dense bf16 peak of one rank's device, which MFU is a share of; null = by the GPU's name, where it "
        "is known, and on a CPU no MFU",
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _one_folder_name(cls, value: str) -> str:
        if value in (".", "..") or "/" in value or "\\" in value:
            raise ValueError("must be a single folder name, without a slash; the folder above it is save_path")
        return value

    @field_validator("resume", mode="before")
    @classmethod
    def _resume_choices(cls, value: Any) -> Any:
        if isinstance(value, str):  # typed on the command line, where the key takes text
            value = {"0": 0, "false": False, "null": None, "true": True}.get(value.lower(), value)
        if value is True:
            return "auto"
        if value in (None, False, 0):  # the original recipes write `resume: 0`
            return "none"
        if isinstance(value, int):
            raise ValueError("must be auto, none or a checkpoint's path; an epoch's number does not name a checkpoint")
        return value
