"""What a program may know about where it runs.

Input: nothing.
"""

from inferlet import Model, runtime


def main():
    print("Hello World!!")
    print(
        f"I am {runtime.instance_id()}, running in the Pie runtime {runtime.version()} for {runtime.username()}."
    )
    for name in runtime.models():
        described = Model.load(name).describe()
        print(
            f"Served here: {name}, {described['vocab_size']} tokens, contexts of {described['max_model_len']}."
        )
