"""Video and image networks. Importing this package fills :data:`distinit_plugin.registry.MODELS`."""

from __future__ import annotations

from distinit_plugin.models.external import ExternalNetwork
from distinit_plugin.models.factory import build_network
from distinit_plugin.models.i3d import I3D
from distinit_plugin.models.network import InputSpec, VideoNetwork
from distinit_plugin.models.r2plus1d import R2Plus1D
from distinit_plugin.models.res2d import Res2D
from distinit_plugin.models.res3d import Res3D
from distinit_plugin.models.s3dg import S3DG

__all__ = ["I3D", "S3DG", "ExternalNetwork", "InputSpec", "R2Plus1D", "Res2D", "Res3D", "VideoNetwork", "build_network"]
