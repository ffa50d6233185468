"""What each feature does on the tokens of a dataset: how often and how strongly it fires, on which tokens, in which examples."""
import numpy as np
from scipy import sparse

BATCH = 8192


def encode_tokens(sae, activations, rows):
    """Features of the given rows of `activations` (numpy, (n_tokens, d)) as a scipy CSR matrix (len(rows), M) float32."""
    import torch

    from fastsae.autoencoder import encode

    blocks = []
    for start in range(0, len(rows), BATCH):
        x = torch.from_numpy(activations[rows[start:start + BATCH]]).to(sae.input_bias.device).float()
        entries = encode(sae, x)
        blocks.append(sparse.csr_matrix((entries.value.cpu().numpy(), entries.column.cpu().numpy().astype(np.int32),
                                         entries.crow().cpu().numpy()), shape=(len(x), entries.n_columns)))
    return sparse.vstack(blocks, format="csr")


def pool(features, example, n_examples, how):
    """Example-level features (n_examples, M) float32: the maximum or the mean over each example's tokens.

    features: CSR (n, M); example: (n,) the example of each row. Examples without rows get 0.
    """
    if how == "mean":
        membership = sparse.csr_matrix((np.ones(len(example), np.float32), (example, np.arange(len(example)))),
                                       shape=(n_examples, len(example)))
        counts = np.maximum(np.bincount(example, minlength=n_examples), 1)[:, None]
        return np.asarray((membership @ features).todense(), np.float32) / counts.astype(np.float32)
    entries = features.tocoo()
    pooled = np.zeros((n_examples, features.shape[1]), np.float32)
    np.maximum.at(pooled, (example[entries.row], entries.col), entries.data)
    return pooled


def token_names(tokenizer, token_ids):
    """Readable names of token ids (n,): ((n,) number of each one's name, list of names).

    Names are decoded tokens without surrounding spaces and in lower case, so that ' We' and 'we' count as one; white space and
    special tokens keep a visible form.
    """
    unique, inverse = np.unique(token_ids, return_inverse=True)
    numbers, names = {}, []
    of_unique = np.empty(len(unique), np.int64)
    for i, token in enumerate(unique.tolist()):
        text = tokenizer.decode([token])
        name = visible(text.strip().lower() or text)
        of_unique[i] = numbers.setdefault(name, len(names))
        if of_unique[i] == len(names):
            names.append(name)
    return of_unique[inverse], names


def visible(text):
    """Text with newlines, tabs and a lone space in visible form."""
    return "␠" if text == " " else text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def characteristic_tokens(features, name_of_token, names, n_top):
    """For each feature its most characteristic tokens, [(name, share of the feature's activation), ...], best first.

    A token scores share * log(share / base rate), its term in the divergence of "where the feature's activation lies" from
    "which tokens there are"; tokens that are not above their base rate are left out.
    """
    n, m = features.shape
    one_hot = sparse.csr_matrix((np.ones(n, np.float32), (np.arange(n), name_of_token)), shape=(n, len(names)))
    mass = (features.T.tocsr() @ one_hot).tocsr()  # (M, names), activation that falls on each token
    base = np.bincount(name_of_token, minlength=len(names)) / n
    result = []
    for j in range(m):
        row = slice(mass.indptr[j], mass.indptr[j + 1])
        column, share = mass.indices[row], mass.data[row] / max(mass.data[row].sum(), 1e-30)
        score = share * np.log(np.maximum(share, 1e-30) / base[column])
        order = np.argsort(-score, kind="stable")[:n_top]
        result.append([(names[column[i]], float(share[i])) for i in order if score[i] > 0])
    return result


def evidence_label(top_tokens, n_named=4, concentrated=0.3):
    """A label made of the most characteristic tokens; says so when they carry little of the feature's activation."""
    if not top_tokens:
        return ""
    named = top_tokens[:n_named]
    text = ", ".join(f"'{name}'" for name, _ in named)
    return text if sum(share for _, share in named) >= concentrated else f"mixed contexts, some of {text}"


def top_examples(pooled_column, n_top):
    """Numbers of the examples with the largest positive values, strongest first."""
    order = np.argsort(-pooled_column, kind="stable")[:n_top]
    return [int(i) for i in order if pooled_column[i] > 0]


def excerpt(tokenizer, token_ids, activations, width=14):
    """One example around its strongest token, that token between « and », as one line of text.

    token_ids (length,), activations (length,) of the feature in it; `width` tokens are shown on each side.
    """
    peak = int(np.argmax(activations))
    left, right = max(0, peak - width), min(len(token_ids), peak + width + 1)
    parts = [tokenizer.decode(token_ids[a:b]) for a, b in ((left, peak), (peak, peak + 1), (peak + 1, right))]
    space = parts[1][:len(parts[1]) - len(parts[1].lstrip(" "))] if parts[1].strip() else ""
    text = f"{parts[0]}{space}«{visible(parts[1].strip() or parts[1])}»{parts[2]}"
    return ("…" if left else "") + " ".join(text.split()) + ("…" if right < len(token_ids) else "")
