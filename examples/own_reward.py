"""A reward of your own. In this folder:

arpo train --model toy --method loofid --rewards "0.5*own_reward.Colourfulness+loo_fid" --out_dir runs/colourful
"""


class Colourfulness:
    "Higher for pictures whose colours differ and whose light is strong"
    def __call__(self, images, prompts=None): # [N, 3, H, W] in [0, 1], and N strings if there are prompts
        return images.std(1).mean((1, 2)) + images.mean((1, 2, 3)) # [N]
