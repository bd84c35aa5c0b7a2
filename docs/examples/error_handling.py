"""Load a configuration file, and fall back to the defaults when it is unusable.

python docs/examples/error_handling.py [CONFIG.yaml]
"""

import sys

from coconut import create_config_from_template, load_config
from coconut.config import ConfigError

try:
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else "invalid_config.yaml")
except ConfigError as e:
    print(f"Configuration error: {e}")
    # Handle configuration error
    config = create_config_from_template("default")

print(f"Model ID: {config.model_id}")
print(f"Batch size: {config.batch_size_training}")
