"""Do attribution methods agree with each other, and does the model depend on the words that they name?"""

import headwater as hw
from headwater import analyses

METHODS = "raw_attention rollout flow alti relevance input_x_gradient"
model = hw.load("tasks-4l")
examples = hw.prompt_set("indirect_object", n=12)
prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]

alike = analyses.agreement(model, prompts, methods=METHODS, by="kendall", answer=answers)
print("agreement, Kendall's tau-b over", len(prompts), "prompts (no sign of being right):")
print(alike["mean"].to_pandas().round(2).to_string(), "\n")

judged = analyses.faithfulness(model, prompts, methods=METHODS, answer=answers)
areas = judged.sel(score="deletion_area")
print("area under the deletion curve, lower is better, with a 95 % interval:")
for name in judged.attribution.values:
    mean, low, high = (float(areas[part].sel(attribution=name)) for part in ("mean", "low", "high"))
    print(f"  {name:<18}{mean:.3f}  ({low:.3f} to {high:.3f})")
