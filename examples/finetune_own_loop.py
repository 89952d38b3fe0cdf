"""Your own training loop, with gamma decaying toward 1 and beta toward 0.

torch's optimizers decay toward 0 only. `parameter_groups` keeps their decay off the norm layers,
and `decay_norms_` does it instead.
"""

import torch
from torch.nn import functional as F

import bnfix
from bnfix import demo
from bnfix.demo.network import digits_net

NORM_DECAY = 0.01

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in demo.digits("train"))
images = (images.unsqueeze(1).float() / 255 - 0.3061) / 0.3760

model = digits_net()
bnfix.swap_norms_(model, ghost_size=16)  # trains with statistics of 16 examples at a time
groups = bnfix.parameter_groups(model, lr=0.003, weight_decay=0.01, norm_decay=NORM_DECAY)
optimizer = torch.optim.AdamW(groups)

model.train()
for epoch in range(5):
    for batch in torch.randperm(len(labels)).split(64):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate = optimizer.param_groups[0]["lr"]  # norms come first; a schedule may have moved it
        bnfix.decay_norms_(model, rate, NORM_DECAY, "identity")
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

bnfix.recalibrate_(model, images.split(128))  # the weights moved, so measure new statistics
test, answers = (torch.from_numpy(array) for array in demo.digits("test"))
test = (test.unsqueeze(1).float() / 255 - 0.3061) / 0.3760
print(bnfix.evaluate(model, [(test, answers)]))
