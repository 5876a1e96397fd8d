"""The published trace of GPT-2 small on indirect objects (Franco & Crovella 2024), made anew where its weights are.

Prompts are drawn from other templates than theirs: the strongest senders should agree, weights and counts roughly.
"""

import sys

import headwater as hw
from headwater import analyses

PUBLISHED = """
9.6.q@end 8.6@end 5.219 191, 9.6.q@end 8.3@end 3.467 -, 9.6.q@end 7.3@end 2.04 -, 9.9.q@end 7.3@end 1.914 115,
9.9.q@end 8.6@end 4.014 191, 9.9.q@end 8.3@end 3.51 145, 9.9.q@end 7.9@end 1.90 134, 9.9.q@end 2.10@end 1.688 -,
10.0.q@end 8.6@end 1.945 70, 10.0.q@end 8.3@end 1.255 -, 8.6.k@S2 6.3@S2 1.312 200, 8.6.k@S2 5.5@S2 1.169 214,
8.6.k@S2 3.0@S2 .961 162, 8.6.q@end 7.9@end 1.079 -, 8.6.q@end 7.5@end .883 -, 8.6.q@end 7.3@end .880 -,
9.9.k@IO 0.9@IO 2.201 196"""  # reader, sender, mean weight, prompts of 256 (- where not told)
try:
    model = hw.load(sys.argv[1] if len(sys.argv) > 1 else "gpt2")
except hw.HeadwaterError as error:
    sys.exit(print(f"not run here: {error}"))
examples = hw.prompt_set("indirect_object", 256)
prompts = [e.prompt.replace(" ,", ",").replace(" .", ".") for e in examples]
words = [[w.strip() for w in model.to_strings(model.to_tokens(p).ids[0])] for p in prompts]
whole = [n for n, e in enumerate(examples) if e.answer in words[n] and words[n].count(e.wrong[0]) == 2]
places = [{len(words[n]) - 1: "end", words[n].index(examples[n].answer): "IO",
           len(words[n]) - 1 - words[n][::-1].index(examples[n].wrong[0]): "S2"} for n in whole]  # fmt: skip
graph = analyses.trace_signals(
    model, [prompts[n] for n in whole], roots="9.6 9.9 10.0", constant=True,
    source=[next(p for p, name in found.items() if name == "IO") for found in places],
    names=lambda prompt, position: places[prompt].get(position, "elsewhere"),
)  # fmt: skip
sizes = [graph.graph[name] for name in ("head_nodes", "edges", "edges_from_heads")]
print(f"{len(whole)} prompts; heads at positions, edges, edges from heads: {sizes}; published 94, 612, 533")
seen = graph.nodes.get("9.9@end", {"count": 0})["count"]
print(f"9.9 fires from end on IO in {seen}; published 201 of 256")
for reader, sender, weight, count in (line.split() for line in PUBLISHED.split(",")):
    about = graph.get_edge_data(sender, reader) or {"weight": 0.0, "count": 0}
    print(f"{sender:8} → {reader:10} {about['weight']:.3f} ({about['count']}); published {weight} ({count})")
