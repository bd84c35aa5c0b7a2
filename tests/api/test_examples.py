"""The examples of the API document, as it prints them, and the scripts of docs/examples/ that grew out of them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path("docs/examples")


def run_script(project: Path, name: str, *arguments: object) -> None:
    """Run a script of docs/examples in this process, as `python docs/examples/NAME ARGUMENTS` does."""
    path = str(project / EXAMPLES / name)
    before = sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def test_load_config_example(aokvqa, capsys):
    from coconut import Config, load_config

    config = load_config("args/multimodal_coconut.yaml")
    print(f"Model ID: {config.model_id}")
    print(f"Batch size: {config.batch_size_training}")

    assert isinstance(config, Config)
    assert capsys.readouterr().out == f"Model ID: {os.environ['MODEL_ID']}\nBatch size: 8\n"


def test_template_example():
    from coconut import create_config_from_template

    config = create_config_from_template("debug", batch_size_training=4)

    assert config.debug and config.batch_size_training == 4


@pytest.mark.slow
def test_basic_usage_example(aokvqa, one_rank, tmp_path):
    from coconut import MultimodalCoconut, load_config, load_tokenizer
    from coconut.data import ImageProcessor, MultimodalDataset
    from coconut.training import MultimodalCoTTrainer

    # Load configuration
    config = load_config("args/multimodal_coconut.yaml")
    config.update(save_path=str(tmp_path), max_steps=1, num_workers=0, max_new_tokens=2)  # only here: a short run

    # Initialize model
    model = MultimodalCoconut.from_pretrained(config.model_id, config)
    tokenizer = load_tokenizer(config.model_id)
    image_processor = ImageProcessor.from_config(config)

    # Create dataset
    dataset = MultimodalDataset(
        data_path=config.train_data_path,
        tokenizer=tokenizer,
        image_processor=image_processor,
    )

    # Create trainer
    trainer = MultimodalCoTTrainer(model, tokenizer, image_processor, config)

    # Start training
    trainer.train()

    assert len(dataset) == 4
    assert trainer.state.step == 1
    assert (config.run_dir / "final" / "model.safetensors").is_file()


def test_custom_configuration_example(tmp_path, monkeypatch):
    from coconut import create_config_from_template, load_config

    monkeypatch.chdir(tmp_path)
    config = create_config_from_template(
        "coconut", c_thought=3, max_latent_stage=6, batch_size_training=4, learning_rate=5e-6
    )
    config.save("args/my_experiment.yaml")  # the document does not make the folder first

    assert load_config("args/my_experiment.yaml", validate=False) == config
    saved = yaml.safe_load(Path("args/my_experiment.yaml").read_text())
    assert (saved["c_thought"], saved["max_latent_stage"], saved["learning_rate"]) == (3, 6, 5e-6)


def test_inference_example(run, maze):
    import torch
    from PIL import Image

    from coconut import MultimodalCoconut, load_tokenizer
    from coconut.data import ImageProcessor

    checkpoint = run.trainer.run_dir / "final"
    image_processor, tokenizer = ImageProcessor.from_pretrained(checkpoint), load_tokenizer(checkpoint)

    # Load model
    model = MultimodalCoconut.from_pretrained(checkpoint)
    model.eval()

    # Prepare inputs
    image = Image.open(maze.folder / "examples" / maze.records()[0]["image"][0])
    question = "What is happening in this image?"

    # Process inputs
    pixel_values = image_processor.process_image(image)
    input_ids = tokenizer.encode(question, return_tensors="pt")

    # Generate response
    with torch.no_grad():
        generated_ids = model.generate(
            pixel_values=pixel_values.unsqueeze(0), input_ids=input_ids, max_new_tokens=100, temperature=0.7
        )

    # Decode response
    response = tokenizer.decode(generated_ids[0], skip_special_tokens=True)

    assert pixel_values.unsqueeze(0).dim() == 5
    assert generated_ids.dim() == 2 and generated_ids.shape[0] == 1 and 1 <= generated_ids.shape[1] <= 100
    assert isinstance(response, str)
    assert "<|latent|>" not in response


def test_generate_example(run, maze):
    import torch

    batch = torch.stack([torch.tensor(run.dataset.tokenizer.encode("start a4 ?"))] * 2)
    images = run.dataset.encoder.image_processor.process_images(
        [maze.folder / "examples" / record["image"][0] for record in maze.records()[:2]]
    )
    generated_ids = run.trainer.model.generate(
        pixel_values=images.unsqueeze(1),
        input_ids=batch,
        max_new_tokens=150,
        temperature=0.7,
        do_sample=True,
    )
    assert generated_ids.shape[0] == 2 and generated_ids.shape[1] <= 150


def test_error_handling_example(tmp_path, monkeypatch, capsys):
    from coconut import create_config_from_template, load_config
    from coconut.config import ConfigError

    monkeypatch.chdir(tmp_path)
    try:
        config = load_config("invalid_config.yaml")
    except ConfigError as e:
        print(f"Configuration error: {e}")
        # Handle configuration error
        config = create_config_from_template("default")

    assert capsys.readouterr().out.startswith("Configuration error: invalid_config.yaml: no such configuration file")
    assert config.c_thought == 2


def test_script_custom_configuration(project, tmp_path, capsys):
    from coconut import load_config

    run_script(project, "custom_configuration.py", tmp_path / "mine.yaml")
    assert "saved:" in capsys.readouterr().out
    assert load_config(tmp_path / "mine.yaml", validate=False).max_latent_stage == 6


def test_script_error_handling(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_script(project, "error_handling.py")
    said = capsys.readouterr().out
    assert "Configuration error: invalid_config.yaml" in said
    assert "Batch size: 8" in said


def test_script_inference(project, run, maze, capsys):
    image = maze.folder / "examples" / maze.records()[0]["image"][0]
    run_script(project, "inference.py", run.trainer.run_dir / "final", image, "start a4 ?")
    assert "Response: " in capsys.readouterr().out


@pytest.mark.slow
def test_script_basic_usage_without_a_launcher_under_zero3(project, aokvqa, tmp_path):
    """`from_pretrained` partitions the weights by itself, and one rank trains."""
    overrides = [f"save_path={tmp_path}", "max_steps=1", "num_workers=0", "max_new_tokens=2"]
    overrides += [f"image_root={aokvqa}", "deepspeed=ds_configs/zero3.json"]
    command = [sys.executable, str(EXAMPLES / "basic_usage.py"), "args/multimodal_coconut.yaml", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "4 samples; the first has" in done.stdout
    assert (tmp_path / "multimodal_coconut" / "final" / "model.safetensors").is_file()


def test_every_script_says_how_to_run_it(project):
    scripts = sorted((project / EXAMPLES).glob("*.py"))
    assert [script.name for script in scripts] == [
        "basic_usage.py",
        "custom_configuration.py",
        "error_handling.py",
        "inference.py",
        "visual_latent_loss.py",  # no script: a configuration names it
    ]
    for script in scripts[:-1]:
        assert f"python docs/examples/{script.name}" in script.read_text()
