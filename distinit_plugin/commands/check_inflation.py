"""How far is a video network, inflated from an image network, from it on a still clip? Layer by layer, per time step.

``--cfg X.yaml`` takes the network and INIT.INFLATE_FROM from a configuration; ``--network Res3D --from
torchvision/resnet18`` needs none. Without --weights both have random weights with calibrated normalisation, which shows
what the architecture makes of a still clip.
"""

from __future__ import annotations

import argparse
import json

from distinit_plugin.commands.common import load_network_from_arguments, whole

FRAMES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", dest="cfg_files", nargs="+", default=[], metavar="YAML", help="YAML files")
    what.add_argument("--network", help="a video network (MODEL.MODEL_NAME), its switches by --opts")
    parser.add_argument("--from", dest="source", help="the image network: torchvision/NAME, timm/NAME, Res2D")
    parser.add_argument("--weights", help="its weights: torchvision tag, timm, file, or random (the default)")
    parser.add_argument("--frames", type=whole(1), help=f"of the still clip; default: the YAML's, or {FRAMES}")
    parser.add_argument("--crop", type=whole(8), help="pixels; default: DATA.TEST_CROP_SIZE")
    parser.add_argument("--image", default="", help="file of the repeated image; default: noise")
    parser.add_argument("--precision", choices=["float64", "float32"], default="float64", help="of the arithmetic")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides, last on the line"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the differences and whether there is a fixed point."""
    frames = arguments.frames or (FRAMES if arguments.network else None)
    pairs = [
        *_pair("MODEL.MODEL_NAME", arguments.network),
        *_pair("INIT.INFLATE_FROM", arguments.source),
        *_pair("INIT.INFLATE_WEIGHTS", arguments.weights),
        *_pair("DATA.NUM_FRAMES", frames),
        *_pair("DATA.TRAIN_CROP_SIZE", arguments.crop),
        *_pair("DATA.TEST_CROP_SIZE", arguments.crop),
    ]
    cfg = load_network_from_arguments(arguments, pairs)

    from distinit_plugin.jobs.inflation_check import check_inflation

    found = check_inflation(cfg, image=arguments.image, precision=arguments.precision)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found.to_text())
    return 0


def _pair(key: str, value: object) -> list[str]:
    return [] if value is None else [key, str(value)]
