"""What the report's terms mean, one sentence each: shown beside a term by pointer, keyboard or tap,
and listed on the Run page."""

# {key: (name, sentence)}, in the order of the list
TERMS = {
    "feature": (
        "feature",
        "One of the directions that the autoencoder learned, and how strongly it is present in a "
        "token; it fires where that is above 0.",
    ),
    "autoencoder": (
        "sparse autoencoder",
        "A small network that rebuilds the model's state at each token from a few of many learned "
        "directions, the features.",
    ),
    "token": ("token", "A piece of text as the model reads it: a word or a part of one."),
    "activation": ("activation", "How strongly a feature is present in a token; 0 means not."),
    "density": ("density", "The share of the tokens on which a feature fires."),
    "rule": (
        "rule",
        "A sentence that says on which tokens a feature fires, found on half of the texts.",
    ),
    "f1": (
        "F1",
        "How well a label holds on texts it was not made from, between 0 and 1: high only if it is "
        "true of most tokens that it names (precision) and names most of those where the feature "
        "fires (recall).",
    ),
    "auc": (
        "AUC",
        "The chance that a random text of the category has more of the feature than a random text "
        "of the others: 0.5 is chance, 1 is perfect; measured on texts not used to choose the "
        "category.",
    ),
    "category": (
        "category",
        "A value of the dataset's label field; a feature is given the one it tells best from all "
        "others, if it does so better than chance.",
    ),
    "by-chance": (
        "by chance",
        "What 95 % of the features stay below when the dataset's labels are shuffled.",
    ),
    "random-tokens": (
        "random tokens",
        "A comparison that nobody trained: as many of the data's own token vectors, used in place "
        "of the learned directions.",
    ),
    "random-directions": (
        "random directions",
        "A comparison that nobody trained: as many directions drawn at random, used in place of "
        "the learned ones.",
    ),
    "detection": (
        "found from five examples",
        "Whether new places where the feature fires look more like its five strongest examples "
        "than other places with the same tokens do: an AUC, 0.5 is chance.",
    ),
    "score": (
        "LLM score",
        "How clear the feature's pattern is to a language model, from 1 (none) to 5 (clear and "
        "without deviation).",
    ),
    "judged": (
        "detection, fuzzing and intruder test",
        "What a language model that reads only the label gets right: which texts the feature fires "
        "in, which marked words are right (0.5 is chance for both), and which of five texts does "
        "not belong (0.2 is chance).",
    ),
    "level": (
        "coarse and fine",
        "The first features of a Matryoshka autoencoder have to rebuild the state alone and so are "
        "coarse; the others add what is fine.",
    ),
    "percentile": (
        "ordinary examples",
        "Examples at five ranks between the strongest and the weakest: what the feature does when "
        "it is not at its best.",
    ),
    "characteristic": (
        "characteristic tokens",
        "The tokens that hold more of the feature's activation than their number in the data would "
        "give them.",
    ),
    "lens": (
        "promotes",
        "The logit lens: which next tokens the feature's direction alone would make more likely; "
        "in early and middle layers often noise.",
    ),
    "lens-chance": (
        "by chance, of promoted tokens",
        "What the strongest token of 95 % of random mixes of the features stays within; weaker "
        "tokens are left out as noise.",
    ),
    "effect": (
        "what a feature does",
        "The model reads the feature's two strongest examples again with the feature taken out "
        "where it fires, and with it added once more: how far that moves its prediction of the "
        "next token; tried on the features with most evidence.",
    ),
    "kl": (
        "KL divergence",
        "How far a prediction of the next token has moved from another, in nats: 0 is not at all.",
    ),
    "random-push": (
        "random pushes",
        "What is left of an effect by chance: pushes of the same length in random directions, at "
        "the same angle to the model's state; a feature that the model uses does more.",
    ),
    "cosine": (
        "cosine",
        "How alike two directions are: 1 for the same, 0 for unrelated, -1 for opposite.",
    ),
    "jaccard": (
        "Jaccard index",
        "Of the tokens on which either of two features fires, the share on which both do.",
    ),
    "dead": ("dead feature", "One that fires on none of the tokens counted here."),
    "mse": (
        "normalised MSE",
        "The error of the rebuilt states in parts of their variance: 0 is perfect, 1 is no better "
        "than the mean state.",
    ),
    "l0": ("L0", "How many features fire on a token, on average."),
    "template": (
        "chat template",
        "The marks that an instruct model expects around every message; they are no words of the "
        "data.",
    ),
    "sink": (
        "attention sink",
        "A token, often the first, whose vector is many times longer than all others; left out of "
        "training and of the figures.",
    ),
    "evidence": (
        "evidence",
        "The mean of two figures on texts not used to find them: the F1 of the label, and the "
        "category's AUC from 0 by chance to 1; what fires for a third or more on punctuation, "
        "the commonest words or the chat template comes last.",
    ),
}
