"""PySlowFast's configuration without PySlowFast, and its way of joining samples with boxes."""

import numpy as np
import torch
from fvcore.common.config import CfgNode as FvcoreNode
from torch.utils.data import default_collate

from distinit_plugin.config.pyslowfast_keys import PYSLOWFAST_DEFAULTS
from distinit_plugin.hosts.slowfast.schema import add_nodes


def root_node():
    """Its root node, from the table of its keys, with this package's nodes in it."""
    node = FvcoreNode()
    for key, value in PYSLOWFAST_DEFAULTS.items():
        *parents, name = key.split(".")
        inner = node
        for parent in parents:
            inner = inner.setdefault(parent, FvcoreNode())
        inner[name] = value
    add_nodes(node)
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
