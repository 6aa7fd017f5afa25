"""A ResNet-20 for pictures of 32 pixels (He et al., 2016), the small network that attacks are often timed on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.data.roles import tinyworld_samples


class Block(nn.Module):
    """Two convolutions and a way around them, which where the size changes is a 1x1 convolution."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        around = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.around = nn.Identity() if same else around

    def forward(self, x: Tensor) -> Tensor:
        """Half the side at stride 2."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.around(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels wide; pixels in [0, 1] go in."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2)]
        self.blocks = nn.Sequential(*(Block(*size) for size in [*sizes, (64, 64, 1), (64, 64, 1)]))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, classes) logits."""
        features = self.blocks(F.relu(self.bn(self.conv((images - 0.5) / 0.25))))
        return self.head(features.mean((2, 3)))


def trained_resnet(updates: int = 150, seed: int = 0) -> ResNet20:
    """A ResNet-20 after so many updates on Tinyworld's training pictures of ten classes: good enough to be attacked."""
    pixels, labels, _, _ = tinyworld_samples("cifar10", "train", 2000)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ResNet20()
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(updates):
            rows = torch.randint(len(labels), (64,))
            noisy = (pixels[rows].float() / 255 + 0.05 * torch.randn(64, 3, 32, 32)).clamp(0, 1)
            loss = F.cross_entropy(network(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()
