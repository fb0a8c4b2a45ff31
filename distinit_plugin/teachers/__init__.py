"""Image and video teachers, frozen by construction."""

from distinit_plugin.teachers.factory import build_teacher
from distinit_plugin.teachers.flow import FlowView
from distinit_plugin.teachers.frozen import Frozen, freeze

__all__ = ["FlowView", "Frozen", "build_teacher", "freeze"]
