"""A transformer of one block that learns a + b modulo p: three tokens a, b and "=", the answer is
read at "="."""

import math

import numpy as np
import torch

from fastsae.runtime import artifacts

D_MODEL, N_HEADS, N_HIDDEN = 128, 4, 512


class ModularTransformer(torch.nn.Module):
    """No layer norm and no biases in attention, as in Nanda et al. (arXiv 2301.05217). Only "=" is
    computed above the embedding: nothing else reaches the answer, and the queries there are the
    same for all pairs.
    """

    def __init__(self, p):
        super().__init__()

        def matrix(*shape):
            return torch.nn.Parameter(torch.randn(shape) / math.sqrt(D_MODEL))

        self.p = p
        # the token p is "="
        self.embedding, self.position = matrix(p + 1, D_MODEL), matrix(3, D_MODEL)
        self.query, self.key, self.value, self.output = (matrix(D_MODEL, D_MODEL) for _ in range(4))
        self.into, self.out = matrix(D_MODEL, N_HIDDEN), matrix(N_HIDDEN, D_MODEL)
        self.hidden_bias, self.out_bias = (
            torch.nn.Parameter(torch.zeros(N_HIDDEN)),
            torch.nn.Parameter(torch.zeros(D_MODEL)),
        )
        self.unembedding = matrix(D_MODEL, p)

    def embedded(self):
        """((p, d) numbers as a, (p, d) numbers as b, (1, d) "="): the residual stream below the
        block."""
        numbers, equals = self.embedding[:-1], self.embedding[-1:]
        return numbers + self.position[0], numbers + self.position[1], equals + self.position[2]

    def residual(self, a, b):
        """(n, d) residual stream at "=" above the block for pairs of numbers a and b (n,)."""
        places, (_, _, equals) = [a, b, torch.zeros_like(a)], self.embedded()
        heads = (-1, N_HEADS, D_MODEL // N_HEADS)
        query = (equals @ self.query).view(heads)
        # (p, heads) each
        scores = [
            ((x @ self.key).view(heads) * query).sum(2) / math.sqrt(heads[2])
            for x in self.embedded()
        ]
        # (3, n, heads)
        weights = torch.stack([s[place] for s, place in zip(scores, places)]).softmax(0)
        mixed = sum(
            w[:, :, None] * (x @ self.value).view(heads)[place]
            for w, x, place in zip(weights, self.embedded(), places)
        )
        x = equals + mixed.flatten(1) @ self.output
        return x + torch.relu(x @ self.into + self.hidden_bias) @ self.out + self.out_bias

    def forward(self, a, b):
        """(n, p) logits of the answer."""
        return self.residual(a, b) @ self.unembedding


def all_pairs(p):
    """(a, b), each (p * p,)."""
    return torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)


def split_pairs(p, train_fraction, seed):
    """(training, test) numbers of pairs."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(p * p))
    return order.tensor_split([round(train_fraction * p * p)])


@torch.no_grad()
def accuracy(model, chosen):
    """Share of right answers on the pairs numbered `chosen`."""
    a, b = (numbers[chosen] for numbers in all_pairs(model.p))
    return float((model(a, b).argmax(1) == (a + b) % model.p).double().mean())


def trained_model(
    path, *, p, train_fraction, epochs, batch_size, learning_rate, weight_decay, seed
):
    """(model, {accuracies and epochs}): read from `path` if it was trained with these very
    settings, else trained and kept there."""
    settings = {name: value for name, value in locals().items() if name != "path"}
    metadata = artifacts.new_metadata("modular_transformer", settings, {})
    model = ModularTransformer(p)
    if artifacts.matches(path, metadata, artifacts.read_checkpoint_metadata):
        checkpoint = artifacts.read_checkpoint(path)
        model.load_state_dict(checkpoint["state_dict"])
        return model, checkpoint["meta"]["figures"]
    model, metadata["figures"] = train(**settings)
    artifacts.write_checkpoint(
        path, {"state_dict": model.state_dict(), "meta": metadata}, keep_old=False
    )
    return model, metadata["figures"]


def train(p, train_fraction, epochs, batch_size, learning_rate, weight_decay, seed):
    """AdamW on batches of the training pairs; the first epoch after which over 99 % of the others
    are right is noted.

    In the second half the learning rate falls to 0: so strong a weight decay otherwise lets the
    loss jump up again and again.
    """
    torch.manual_seed(seed)
    model, (a, b), (training, test) = (
        ModularTransformer(p),
        all_pairs(p),
        split_pairs(p, train_fraction, seed),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    above = None
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(
            1.0, 2 * (epochs - epoch + 1) / epochs
        )
        for batch in training[torch.randperm(len(training))].split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(
                model(a[batch], b[batch]), (a + b)[batch] % p
            ).backward()
            optimizer.step()
        if above is None and accuracy(model, test) > 0.99:
            above = epoch
    return model, {
        "train_accuracy": accuracy(model, training),
        "test_accuracy": accuracy(model, test),
        "n_train_pairs": len(training),
        "n_test_pairs": len(test),
        "first_epoch_above_99_percent": above,
        "epochs": epochs,
    }
