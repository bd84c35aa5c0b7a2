"""Ask a trained checkpoint about a picture.

python docs/examples/inference.py CHECKPOINT IMAGE [QUESTION]
"""

import sys

import torch
from PIL import Image

from coconut import MultimodalCoconut, load_tokenizer
from coconut.data import ImageProcessor

if len(sys.argv) < 3:
    sys.exit(__doc__)
checkpoint, image_path = sys.argv[1:3]
question = sys.argv[3] if len(sys.argv) > 3 else "What is happening in this image?"

# Load model; tokenizer and image settings are saved beside the weights
model = MultimodalCoconut.from_pretrained(checkpoint)
model.eval()
tokenizer = load_tokenizer(checkpoint)
image_processor = ImageProcessor.from_pretrained(checkpoint)

# Process inputs: the question as it is; the model adds prompt, image tokens and thoughts
image = Image.open(image_path)
pixel_values = image_processor.process_image(image)
input_ids = tokenizer.encode(question, return_tensors="pt")

# Generate response
with torch.no_grad():
    generated_ids = model.generate(
        pixel_values=pixel_values.unsqueeze(0),
        input_ids=input_ids,
        max_new_tokens=100,
        temperature=0.7,
    )

# Decode response
response = tokenizer.decode(generated_ids[0], skip_special_tokens=True)
print(f"Response: {response}")
