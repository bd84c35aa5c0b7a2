"""Put an exported folder on the Hugging Face hub (or on the server that HF_ENDPOINT names)."""

from __future__ import annotations

from pathlib import Path

from coconut.types import ConfigError


def check_push(repo: str) -> None:
    """Whether a push can work at all: asked before any work is done for it.

    Raises:
        ConfigError: the name is none, there is no token, or the hub does not answer or does not take it.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo} is no name of a repository: {error}") from None
    if "/" not in repo:
        raise ConfigError(f"--push-to-hub {repo} has no owner; write OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push-to-hub needs the network, and HF_HUB_OFFLINE is set; unset it, or export without")
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token that may write: `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.whoami()
    except HfHubHTTPError as error:
        raise ConfigError(f"--push-to-hub: {api.endpoint} does not take the token ({_short(error)})") from None
    except Exception as error:  # of the HTTP library, which is not always the same
        raise ConfigError(f"--push-to-hub: {api.endpoint} cannot be reached ({_short(error)})") from None


def push(folder: Path, repo: str) -> str:
    """Upload a folder, to a new repository (private, until its owner opens it) or to one that is there already.

    Returns:
        its address.

    Raises:
        ConfigError: the hub refuses; the folder stays, to be pushed again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from Multimodal CoCoNuT")
    except Exception as error:  # of the hub or of the HTTP library
        raise ConfigError(
            f"{folder} is exported, but not pushed to {repo}: {_short(error)}; once that is mended, "
            f"`hf upload {repo} {folder}` does it"
        ) from None
    return address


def _short(error: Exception) -> str:
    """The first line of an error; those of the hub go on for several."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
