"""pytorchcv: one small network of each of many families."""

from __future__ import annotations

from benchmarks.libraries.entry import Entry, Table, images, net


def _cv(name: str, size: int) -> Entry:
    inputs = images(size=size, batch=2)
    return net("pytorchcv.model_provider:get_model", inputs, name, in_size=(size, size))


_SMALL = {
    32: (
        *("resnet20_cifar10", "preresnet20_cifar10", "densenet40_k12_cifar10", "nin_cifar10"),
        *("shakeshakeresnet20_2x16d_cifar10", "shakedropresnet20_cifar10", "diaresnet20_cifar10"),
        *("resdropresnet20_cifar10", "xdensenet40_2_k24_bc_cifar10"),
        "msdnet22_cifar10",
    ),
    64: (
        *("dicenet_wd5", "regnetx002", "cgnet_cityscapes", "espcnet_cityscapes"),
        *("lednet_cityscapes", "enet_cityscapes", "fpenet_cityscapes", "dabnet_cityscapes"),
    ),
    196: (
        *("shufflenet_g3_wd4", "shufflenetv2_wd2", "menet108_8x1_g3"),
        *("igcv3_wd4", "mobilenet_wd4", "ghostnet"),
    ),
}

TABLE: Table = {
    "pytorchcv": {name: _cv(name, size) for size, names in _SMALL.items() for name in names},
}
