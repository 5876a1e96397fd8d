"""Heads made to look at the wrong colour: is a model repaired that takes an object's old colour for its new one?"""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
found_on = hw.prompt_set("colored_conflict", 12, seed=1, model=model)  # heads are chosen on other prompts
judged_on = hw.prompt_set("colored_conflict", 24, seed=2, model=model)
print(found_on[0].prompt, "\n  now", found_on[0].answer.strip(), "before", found_on[0].wrong[0].strip())

heads, movers = analyses.inhibition_like(model, found_on)  # by path patching through the movers' queries
print("heads", *heads, "movers", *movers)
# -4 is the asked object; its head 0.6 was found by trying each by itself on other prompts
for position, names in ((-1, [str(head) for head in heads]), (-4, ["0.6"])):
    found = analyses.repair(
        model, judged_on, heads=names, position=position, movers=[str(head) for head in movers], controls=2
    )
    print(f"\n{' '.join(names)} forced at position {position}: answered right, with new mistakes")
    for treatment in found.treatment.values:
        mean, low, high = found.accuracy.sel(treatment=treatment).values
        new = float(found.new_mistakes.sel(treatment=treatment))
        print(f"  {treatment:13}{mean:6.2f} ({low:.2f} to {high:.2f}) {new:6.2f}")
