import os

open(os.path.join(os.environ["SM_MODEL_DIR"], "done-" + os.environ["SM_CURRENT_HOST"]), "w").close()
print("trained", flush=True)
