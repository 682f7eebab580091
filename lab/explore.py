"""Writes a page to touch: how a model moves its points on an image, reads there and attends.

    python lab/explore.py shapes:7 --checkpoint runs/shapes-1/last.pt --out page.html

It opens by double click: lab/explore.html, with numbers. IMAGE and --model are as in lab/draw.py.
"""
import base64
import io
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run
from lab.draw import add_image, look

HERE = Path(__file__).parent


def rounded(numbers):
    return torch.round(numbers.double(), decimals=5).tolist()


def describe(view) -> dict:
    """A view of `inspect` for the page, in px of the map. Of each group's channels it has the one
    that varies most. Attention is in units of 1 / 65535."""
    module, in_map = view.attention, lambda places: rounded((places - view.first) / view.cell)
    (rows, columns), (H, W, C), G = view.reference.shape[:2], view.map.shape[1:], module.groups
    maps = view.map[0].movedim(2, 0)  # (C, H, W)
    varied = maps.flatten(1).var(dim=1, correction=0).view(G, C // G).argmax(dim=1)
    channels = torch.arange(G) * (C // G) + varied  # one for each group
    relative = module.position == "relative"
    tables = dat.resize(module.table, (2 * H - 1, 2 * W - 1)) if relative else None
    attention = (view.weights[0] * 65535).round().numpy().astype("<u2").tobytes()  # (M, N, K)
    return {"rows": rows, "columns": columns, "H": H, "W": W, "cell": view.cell,
            "first": view.first, "groups": G, "heads": module.heads,
            "reference": in_map(view.reference.flatten(0, 1)), "queries": in_map(view.queries),
            "points": in_map(view.points[0].flatten(1, 2)), "channels": channels.tolist(),
            "maps": rounded(maps[channels]), "tables": rounded(tables) if relative else None,
            "attention": base64.b64encode(attention).decode()}


@torch.no_grad()
def page(image, views, title: str, tutorial: str) -> str:
    """The HTML page of an image (3, H, W) uint8. `tutorial`: where its links lead."""
    picture = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture, "png")
    data = {"title": title, "tutorial": tutorial, "height": image.shape[1], "width": image.shape[2],
            "image": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
            "blocks": [describe(view) for view in views]}
    # No "<" stays, so that no name of a class or file can end the script.
    filled = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Path(HERE, "explore.html").read_text(encoding="utf-8").replace("DATA", filled, 1)


def main(parser):
    add_image(parser)
    parser.add_argument("--out", default="page.html", metavar="HTML")
    args = parser.parse_args()
    image, views, title = look(args)
    tutorial = Path(os.path.relpath(HERE.parent / "tutorial.md", Path(args.out).parent))
    content = page(image, views, title, quote(tutorial.as_posix())).encode()
    dat.write_atomically(args.out, content)
    print(f"{title}: open {args.out} in a browser ({len(content) / 1000:.0f} kB)")


if __name__ == "__main__":
    run(main, __doc__)
