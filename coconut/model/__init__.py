"""The model layer: backbone -> spans -> pass_cache -> multipass -> loss, generate -> coconut."""

from coconut.model.coconut import CoconutOutput, MultimodalCoconut

__all__ = ["CoconutOutput", "MultimodalCoconut"]
