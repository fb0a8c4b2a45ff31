"""What a student is trained on: weighted terms ``student layer → adapter → loss ← teacher layer``.

Nothing here knows a method: DistInit is ``features → linear → soft_cross_entropy ← logits``, D3D is ``logits → own →
mse ← logits`` plus ``logits → own → cross_entropy ← label``, flow as supervision is ``3A → pwc → flow_decoding ←
flow``, AVA is ``logits of boxes → bce ← actions``. Shapes: B batch, C channels, T frames, H height, W width, K classes,
D feature dimension.
"""

from __future__ import annotations

from distinit_plugin.objectives.adapters import build_adapter, layer_size, match_grid, on_students_grid
from distinit_plugin.objectives.boxes import action_term, offset_term, proposal_term
from distinit_plugin.objectives.objective import (
    Objective,
    Prepared,
    Trainable,
    combine_counts,
    even_counts,
    topk_accuracy,
)
from distinit_plugin.objectives.terms import Term

__all__ = [
    "Objective",
    "Prepared",
    "Term",
    "Trainable",
    "action_term",
    "build_adapter",
    "combine_counts",
    "even_counts",
    "layer_size",
    "match_grid",
    "offset_term",
    "on_students_grid",
    "proposal_term",
    "topk_accuracy",
]
