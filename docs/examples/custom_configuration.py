"""Make a configuration file of one's own from a template.

python docs/examples/custom_configuration.py [FILE.yaml]
"""

import sys

from coconut import create_config_from_template

# Create custom configuration
config = create_config_from_template(
    "coconut",
    c_thought=3,
    max_latent_stage=6,
    batch_size_training=4,
    learning_rate=5e-6,
)

# Save custom configuration
path = sys.argv[1] if len(sys.argv) > 1 else "args/my_experiment.yaml"
config.save(path)
print(f"saved: {path}; name its data with train_data_path before training")
