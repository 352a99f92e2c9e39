"""The terms of the report and the documentation, each with its definition: the page's tooltips and docs/glossary.md."""

TERMS = {
    "alone": "The change when this expert alone is switched off, at its trigger tokens.",
    "attention sink": (
        "The attention that the heads give to the first token of a sequence, averaged over the queries in the last "
        "three quarters of the sequence. Without a super expert it falls."
    ),
    "beside the others": "What switching this expert off adds when all other candidates are off already.",
    "candidate": (
        "An expert to which the statistics point: it is among the largest by max|y|, and it fires on first tokens, "
        "writes what later layers carry, or stands out. Whether the model depends on it takes a proof."
    ),
    "carried": "Whether the expert writes a massive activation that later layers keep.",
    "channel": "The element of the hidden state in which the expert's output is largest.",
    "control": (
        "A run without other experts: drawn at random, or visited by the same tokens. An effect that the controls "
        "reach too says nothing about the expert."
    ),
    "coverage": "How many rows the experts saw. A maximum over fewer than 32 rows says little.",
    "D_sink": "The share of a layer's attention sink that is lost without the expert.",
    "fed by": (
        "The upstream experts without which the expert falls silent, and how much of its |y| is left without each."
    ),
    "first token": (
        "A token that begins a sequence, usually BOS. Super experts fire on first tokens, whatever the text."
    ),
    "|h|": "The size of an element of the input of an expert's down_proj.",
    "headroom": (
        "The largest finite number of a format (65504 in fp16, 448 in fp8 E4M3) over the largest element. Below 1 the"
        " element overflows unless it is scaled."
    ),
    "in set": (
        "Whether the published rule (arXiv 2507.23279) flags the expert: max|y| above both the 99.5th percentile of "
        "the population and a tenth of its maximum. The rule flags something in nearly every model."
    ),
    "interval": "The range in which the change lies, by how it varies over the windows of text.",
    "KL": (
        "The mean Kullback-Leibler divergence between the predictions of two models, in nats per token. 0 means equal"
        " predictions."
    ),
    "kurtosis": (
        "Excess kurtosis of max|y| over the experts of a layer: the fourth central moment over the squared variance, "
        "minus 3. It is 0 for a normal distribution. Of n experts it is at most n - 5 + 1/(n - 1), which a layer "
        "reaches where one expert stands alone."
    ),
    "massive activation": "An element of the residual stream that is far larger than the median element.",
    "max|y|": "The largest |y| of an expert, over all its rows and channels.",
    "÷ median": "max|y| over the median of max|y| of the layer's routed experts that saw rows.",
    "median of a layer": "The median of max|y| over the layer's routed experts that saw rows.",
    "more tokens": (
        "How many more tokens of such text it takes until 32 rows are expected. For an expert without rows, the rate "
        "is taken as 3 over the tokens so far, which is its upper bound with 95% probability: it probably takes more."
    ),
    "÷ next": "max|y| over the next largest max|y| of the population.",
    "perplexity": "The exponential of the model's mean loss on text. A model that predicts worse has a higher one.",
    "population": (
        "The experts that the published rule compares: the routed and shared experts in the first 75% of the layers."
    ),
    "protected": (
        "Left as it is when the other experts are pruned or quantized: every expert that is proved, undecided or a "
        "candidate."
    ),
    "proved": (
        "The model depends on the expert: switched off where it fires, perplexity rises by more than the smallest "
        "effect that matters and more than for any control, and the attention sinks or the massive activations fall "
        "by half."
    ),
    "REAP": (
        "The saliency by which pruning chooses by default: the mean over an expert's rows of routing weight times "
        "output norm (arXiv 2510.13999)."
    ),
    "refuted": (
        "The model does not depend on the expert: switched off where it fires, the whole interval lies below the "
        "smallest effect that matters."
    ),
    "remove": "Switch an expert off by keeping the router from choosing it.",
    "renormalize": "Switch an expert off by leaving its output out and scaling up the other routing weights.",
    "residual stream": (
        "The hidden state, to which every layer adds its output. |x| is the size of one of its elements."
    ),
    "routing weight": (
        "The factor by which the router scales an expert's output before adding it to the residual stream."
    ),
    "row": "One token in one expert. A token that the router sends to four experts makes four rows.",
    "saliency": "A score of how much an expert contributes. Pruning drops the experts with the lowest.",
    "simulated format": (
        "Weights are rounded to the nearest value of a format, with one scale per output channel and group of inputs."
        " The arithmetic stays that of the model."
    ),
    "skip": "Switch an expert off by leaving its output out.",
    "stands out": "max|y| is at least 50, and at least 10 times the median of the layer, by default.",
    "super expert": (
        "One of the few experts of a Mixture-of-Experts model whose outputs are extreme, and without which the model "
        "breaks (arXiv 2507.23279)."
    ),
    "trigger token": "A token on which an expert fires: |y| reaches half of the expert's largest value.",
    "undecided": "The proof supports neither proved nor refuted. The reason says what would decide.",
    "verdict": "How strong the evidence is: candidate, proved, refuted or undecided.",
    "|y|": "The size of an element of an expert's output: what its down_proj gives, before the routing weight.",
}

# Heads of columns that stand for a term in other words.
HEADS = {
    "KL (nats per token)": "KL",
    "fires on tokens": "trigger token",
    "headroom fp16": "headroom",
    "headroom fp8": "headroom",
    "largest |y|": "max|y|",
    "massive elements": "massive activation",
    "max|h|": "|h|",
    "max|x|": "residual stream",
    "max|y|: base": "max|y|",
    "perplexity: base": "perplexity",
    "rows": "row",
    "rows: fewest": "row",
    "to be protected": "protected",
    "|y| on first tokens": "first token",
    "routing weight on first tokens": "routing weight",
}
