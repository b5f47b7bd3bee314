/* FPENet: real-time street-scene segmentation (Liu & Yin, BMVC 2019).
 *
 * Link with -lfpenet (target/release/libfpenet.so after `cargo build --release`).
 *
 *     fpenet_engine *engine;
 *     if (fpenet_create(NULL, 0, 0, NULL, &engine) != FPENET_OK)
 *         fprintf(stderr, "%s\n", fpenet_last_error());
 *     fpenet_run(engine, rgb, width, height, 0, labels, 0);
 *     fpenet_destroy(engine);
 *
 * Threads: an engine may be used from any thread. Calls of fpenet_run on one engine wait for each
 * other; engines do not. fpenet_destroy must not run beside any other call on the same engine.
 * fpenet_last_error is kept per thread.
 */
#ifndef FPENET_H
#define FPENET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What functions return. After anything but FPENET_OK, fpenet_last_error() tells the reason. */
enum fpenet_status {
    FPENET_OK = 0,
    FPENET_FAILED = 1,  /* the work failed: a file, a device, memory */
    FPENET_USAGE = 2,   /* the call makes no sense as given */
    FPENET_INTERNAL = 3 /* a defect of this library */
};

/* A model on a device. */
typedef struct fpenet_engine fpenet_engine;

/* Creates an engine.
 *
 * model          model file (UTF-8 path), or NULL for the one that the library carries
 * width, height  size at which the network runs, 16 to 32768 pixels each; 0, 0 for each frame's
 *                own (for a frame of more than twice the area that the model was trained on, that
 *                area). Memory for a given size is taken here, else at the first frame.
 * device         "auto", "cpu" or "cuda"; NULL for "auto": CUDA where it works, else the CPU
 * engine         receives the engine, or NULL where it fails
 */
int fpenet_create(const char *model, int width, int height, const char *device,
                  fpenet_engine **engine);

/* Labels one frame of any size.
 *
 * rgb            interleaved R, G, B, 8 bits each, rows from top to bottom
 * width, height  of the frame, in pixels
 * rgb_stride     bytes from one row to the next; 0 for 3 * width
 * labels         receives a class index per pixel, at the frame's size
 * labels_stride  bytes from one row to the next; 0 for width
 *
 * A failure leaves labels as they were.
 */
int fpenet_run(fpenet_engine *engine, const uint8_t *rgb, int width, int height,
               size_t rgb_stride, uint8_t *labels, size_t labels_stride);

/* Number of classes; labels are smaller than it. 0 for NULL. */
int fpenet_class_count(const fpenet_engine *engine);

/* Name of a class (UTF-8), valid as long as the engine; NULL for an index out of range. */
const char *fpenet_class_name(const fpenet_engine *engine, int index);

/* Colour of a class: 3 bytes R, G, B. */
int fpenet_class_colour(const fpenet_engine *engine, int index, uint8_t *rgb);

/* Text (one line, UTF-8) of the last failure on this thread, valid until its next call into the
 * library; empty without one. Never NULL. */
const char *fpenet_last_error(void);

/* Version of the library, such as "0.1.0". */
const char *fpenet_version(void);

/* Frees an engine; NULL is fine. */
void fpenet_destroy(fpenet_engine *engine);

#ifdef __cplusplus
}
#endif

#endif
