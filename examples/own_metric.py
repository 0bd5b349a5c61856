"""A score of your own for finished pictures, beside distances and accuracy. In this folder:

arpo eval --model toy --n 40 --scores own_metric.sharpness --out_dir runs/sharp
"""


def sharpness(images, prompts=None): # [N, 3, H, W] in [0, 1], and N strings if the classes have names
    "How much neighbouring pixels differ, so that blur is low and noise is high"
    across, down = images.diff(dim=-1).abs(), images.diff(dim=-2).abs()
    return across.mean((1, 2, 3)) + down.mean((1, 2, 3)) # [N]
