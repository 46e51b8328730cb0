"""Shows where a residual network loses its bounds: the width of each layer's box, by name.

A layer of which the width jumps is where to look: at its weights, or at a norm before it.
"""

import torch

import cibp_fast as cf

EPS = 1 / 255

torch.manual_seed(0)
x = torch.rand(8, 3, 32, 32)
networks = {
    "torch's initial weights": cf.models.resnet((3, 32, 32), width=2),
    "those of Shi et al. for IBP": cf.models.ibp_(cf.models.resnet((3, 32, 32), width=2)),
}
columns = {}
for name, model in networks.items():
    model(x)  # a batch in training mode, so that the norms have statistics
    out = cf.bounds(model.eval(), x, cf.Interval.ball(x, EPS), layers=True)
    columns[name] = {layer: box.width.mean().item() for layer, box in out.layers.items()}

first, second = columns.values()
print(f"{'mean width':24}" + "".join(f"{name:>30}" for name in columns))
for layer in first:
    print(f"{layer:24}{first[layer]:30.3g}{second[layer]:30.3g}")
