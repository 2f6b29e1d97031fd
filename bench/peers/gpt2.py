"""GPT-2 in PyTorch, and what it is trained on: the same modules, initial values and tokens as bench/gpu/gpt2.hpp."""

import torch
from torch import nn
from torch.nn import functional

# Width, layers, heads, context, vocabulary.
CONFIGS = {"124m": (768, 12, 12, 1024, 50257), "774m": (1280, 36, 20, 1024, 50257), "tiny": (64, 3, 4, 32, 100)}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """The head is the token embedding."""

    def __init__(self, name):
        super().__init__()
        width, layers, heads, context, self.vocabulary = CONFIGS[name]
        self.tok = nn.Embedding(self.vocabulary, width)
        self.pos = nn.Embedding(context, width)
        for i in range(layers):
            self.register_module(f"block{i}", Block(width, heads))
        self.norm = nn.LayerNorm(width)

    def blocks(self):
        return [module for module in self.children() if isinstance(module, Block)]

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks():
            x = block(x)
        return functional.linear(self.norm(x), self.tok.weight)


def noise(count, salt, device):
    wild = (torch.arange(count, dtype=torch.float64, device=device) * 12.9898 + 78.233 * salt).sin() * 43758.5453
    return wild - wild.floor()


def initialize(model, device):
    """`device` is where the numbers are made."""
    with torch.no_grad():
        for number, (name, param) in enumerate(model.named_parameters(), 1):
            if name.endswith("bias"):
                param.zero_()
            elif param.dim() == 1:
                param.fill_(1.0)
            else:
                width = 0.02 * 3.4641016151377544
                param.copy_(((noise(param.numel(), number, device) - 0.5) * width).view(param.shape))


def tokens_of(model, step, batch, tokens, device):
    drawn = noise(batch * (tokens + 1), 1000 + step, device).pow(4)
    return (drawn * float(model.vocabulary)).long().view(batch, tokens + 1)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
