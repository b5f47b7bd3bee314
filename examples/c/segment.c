/* Labels a photo with FPENet: binary PPM in, binary PGM of class indices out.
 *
 *     cc -Iinclude examples/c/segment.c -o segment -Ltarget/release -lfpenet \
 *        -Wl,-rpath,"$PWD/target/release"
 *     ./segment photo.ppm labels.pgm [model.safetensors]
 */
#include <stdio.h>
#include <stdlib.h>

#include "fpenet.h"

/* Reads a binary PPM of 8 bits per sample; NULL where it is none. */
static uint8_t *read_ppm(const char *path, int *width, int *height) {
    FILE *file = fopen(path, "rb");
    uint8_t *rgb = NULL;
    int depth;
    if (file == NULL)
        return NULL;
    if (fscanf(file, "P6 %d %d %d", width, height, &depth) == 3 && fgetc(file) != EOF &&
        depth == 255 && *width > 0 && *height > 0 && *width <= 32768 && *height <= 32768) {
        size_t size = (size_t)*width * (size_t)*height * 3;
        rgb = malloc(size);
        if (rgb != NULL && fread(rgb, 1, size, file) != size) {
            free(rgb);
            rgb = NULL;
        }
    }
    fclose(file);
    return rgb;
}

static int write_pgm(const char *path, const uint8_t *labels, int width, int height) {
    size_t size = (size_t)width * (size_t)height;
    FILE *file = fopen(path, "wb");
    int written;
    if (file == NULL)
        return 0;
    written = fprintf(file, "P5\n%d %d\n255\n", width, height) > 0 &&
              fwrite(labels, 1, size, file) == size;
    return fclose(file) == 0 && written;
}

static void print_shares(const fpenet_engine *engine, const uint8_t *labels, size_t pixels) {
    size_t counts[256] = {0};
    size_t i;
    int class;
    for (i = 0; i < pixels; i++)
        counts[labels[i]]++;
    for (class = 0; class < fpenet_class_count(engine); class++)
        if (counts[class] > 0)
            printf("%5.1f %%  %s\n", 100.0 * (double)counts[class] / (double)pixels,
                   fpenet_class_name(engine, class));
}

int main(int argc, char **argv) {
    fpenet_engine *engine = NULL;
    uint8_t *rgb, *labels;
    int width, height, code = EXIT_FAILURE;

    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: %s photo.ppm labels.pgm [model.safetensors]\n", argv[0]);
        return 2;
    }
    rgb = read_ppm(argv[1], &width, &height);
    if (rgb == NULL) {
        fprintf(stderr, "%s: expected a binary PPM (P6) of 8 bits\n", argv[1]);
        return EXIT_FAILURE;
    }
    labels = malloc((size_t)width * (size_t)height);
    if (labels == NULL ||
        fpenet_create(argc == 4 ? argv[3] : NULL, 0, 0, "auto", &engine) != FPENET_OK ||
        fpenet_run(engine, rgb, width, height, 0, labels, 0) != FPENET_OK) {
        fprintf(stderr, "fpenet: %s\n", fpenet_last_error());
    } else if (!write_pgm(argv[2], labels, width, height)) {
        fprintf(stderr, "%s: cannot write\n", argv[2]);
    } else {
        print_shares(engine, labels, (size_t)width * (size_t)height);
        code = EXIT_SUCCESS;
    }
    fpenet_destroy(engine);
    free(labels);
    free(rgb);
    return code;
}
