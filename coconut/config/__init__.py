"""The typed configuration: one schema, one merge order (base file -> file -> command line), every fault at once."""

from coconut.config.config import Config
from coconut.config.load import create_config_from_template, load_config, parse_overrides, validate_config
from coconut.types import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "create_config_from_template",
    "load_config",
    "parse_overrides",
    "validate_config",
]
