"""PySlowFast's configuration without PySlowFast, and its way of joining samples with boxes."""

import numpy as np
import torch
from torch.utils.data import default_collate

from distinit_plugin.hosts.slowfast.schema import add_nodes, default_root


def root_node():
    """Its root node with this package's nodes in it, put there twice, which is as once."""
    node = default_root()
    add_nodes(node)
    return node


def joined(items):
    """(inputs, labels, boxes, original boxes, metadata) of a batch, as its loader hands them to the loops."""
    inputs, labels, _, _, metas = zip(*items, strict=True)

    def numbered(name):
        rows = [np.insert(np.asarray(meta[name]), 0, clip, axis=1) for clip, meta in enumerate(metas)]
        return torch.from_numpy(np.concatenate(rows)).float()

    metadata = [place for meta in metas for place in meta["metadata"]]
    return (
        default_collate(inputs),
        torch.from_numpy(np.concatenate(labels)).float(),
        numbered("boxes"),
        numbered("ori_boxes"),
        torch.tensor(metadata).view(-1, 2),
    )
