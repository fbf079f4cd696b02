"""Six questions to one position of one pass, and whether their answers agree with each other.

A pass returns what it is asked for at any of its rows: here a greedy token, the eight most probable tokens, the raw
logits, the log-probability of one token and of several, and the entropy, all at the last token of a prompt.

Input: optional: prompt. Fails if two answers contradict each other.
"""

import math

from inferlet import Context, Distribution, Entropy, Logits, Logprob, Logprobs, Model, Sampler
from inferlet.forward import floats

PROMPT = "The capital of France is"


async def main(input):
    model = Model.load()
    tokenizer = model.tokenizer()
    tokens = tokenizer.encode(input.get("prompt", PROMPT))
    top, probabilities = await most_probable(model, tokens)

    forward = Context(model).forward().input(tokens)
    last = len(tokens) - 1
    greedy = forward.sample([last], Sampler.argmax())
    distribution = forward.probe(last, Distribution(1.0, 8))
    logits = forward.probe(last, Logits())
    one = forward.probe(last, Logprob(top[0]))
    several = forward.probe(last, Logprobs(top))
    entropy = forward.probe(last, Entropy())
    output = await forward.execute()

    values = floats(output.logits(logits))
    best = values.index(max(values))
    normalizer = math.log(sum(math.exp(value - values[best]) for value in values)) + values[best]
    logprobs = output.logprobs(several)

    check("the greedy token has the highest logit", output.token(greedy) == best)
    check("the distribution begins with it", output.distribution(distribution)[0][0] == best)
    check("two passes over the same tokens agree", output.distribution(distribution)[0] == top)
    check("probabilities fall and add up to at most 1", is_sorted_distribution(probabilities))
    check("one log-probability equals the first of several", output.logprobs(one)[0] == logprobs[0])
    check("log-probabilities follow from the logits", close(logprobs, [values[t] - normalizer for t in top]))
    check("and so do the probabilities", close(logprobs, [math.log(p) for p in probabilities]))
    check("the entropy is that of some distribution", 0 <= output.entropy(entropy) <= math.log(len(values)))
    return {
        "next": tokenizer.decode([best]),
        "entropy": output.entropy(entropy),
        "top": [[tokenizer.decode([token]), p] for token, p in zip(top, probabilities, strict=True)],
    }


async def most_probable(model, tokens):
    """The eight most probable next tokens, by a pass of their own."""
    forward = Context(model).forward().input(tokens)
    handle = forward.probe(len(tokens) - 1, Distribution(1.0, 8))
    return (await forward.execute()).distribution(handle)


def is_sorted_distribution(probabilities):
    return probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.0001


def close(numbers, others):
    return all(math.isclose(a, b, abs_tol=1e-2) for a, b in zip(numbers, others, strict=True))


def check(claim, holds):
    print(f"{'ok' if holds else 'WRONG'}: {claim}")
    if not holds:
        raise AssertionError(claim)
