"""Video and image networks. Importing this package fills :data:`distinit_plugin.registry.MODELS`."""

from __future__ import annotations

from distinit_plugin.models.c3d import C3D
from distinit_plugin.models.conv_lstm import ConvLSTM
from distinit_plugin.models.external import ExternalNetwork
from distinit_plugin.models.factory import build_network
from distinit_plugin.models.i3d import I3D
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.models.predicted_flow import PredictedFlow3D
from distinit_plugin.models.r2plus1d import R2Plus1D
from distinit_plugin.models.res2d import Res2D
from distinit_plugin.models.res3d import Res3D
from distinit_plugin.models.s3dg import S3DG
from distinit_plugin.models.two_stream import Fused3D, TwoStream

__all__ = [
    "C3D",
    "I3D",
    "S3DG",
    "ConvLSTM",
    "ExternalNetwork",
    "Fused3D",
    "InputSpec",
    "PredictedFlow3D",
    "R2Plus1D",
    "Res2D",
    "Res3D",
    "TwoStream",
    "VideoNetwork",
    "build_network",
]
