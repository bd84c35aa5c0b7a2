"""Train what a configuration file describes, on one rank.

    python docs/examples/basic_usage.py [CONFIG.yaml [key=value ...]]

`launch/train.py` does the same under a launcher, with more checks before the model is loaded. The data is a JSON or
JSONL file here; of shards `coconut.data.open_dataset` gives the samples.
"""

import sys

from coconut import MultimodalCoconut, load_config, load_tokenizer
from coconut.data import ImageProcessor, MultimodalDataset
from coconut.training import MultimodalCoTTrainer

# Load configuration
config_path = sys.argv[1] if len(sys.argv) > 1 else "args/multimodal_coconut.yaml"
config = load_config(config_path, overrides=sys.argv[2:])

# Initialize model, tokenizer and image processor
model = MultimodalCoconut.from_pretrained(config.model_id, config)
tokenizer = load_tokenizer(config.model_id)
image_processor = ImageProcessor.from_config(config)

# Look at the data, as it is at stage 0
dataset = MultimodalDataset(
    data_path=config.train_data_path,
    tokenizer=tokenizer,
    image_processor=image_processor,
    image_root=config.image_root,
)
sample = dataset[0]
print(f"{len(dataset)} samples; the first has {len(sample['input_ids'])} tokens and {sample['num_patches']} tiles")

# Create trainer
trainer = MultimodalCoTTrainer(model, tokenizer, image_processor, config)

# Start training
trainer.train()
print(f"trained: {config.run_dir / 'final'}")
