"""Keys and titles that measuring and reporting share; a report needs no torch."""

OURS = "prox"
FLAT = "flat25m"
MAIN = "main"
COUPLED = "coupled"
LIMIT = "limit"  # the row that moves as many bytes
MODELS = {
    "resnet50": "ResNet-50",
    "resnet18": "ResNet-18",
    "vit_b_16": "ViT-B/16",
    FLAT: "one flat tensor",
}
EXPERIMENTS = ("digits", "target", "frontier")  # of channels
